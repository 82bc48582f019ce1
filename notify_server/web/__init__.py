"""Answers HTTP: the API, the dashboard, health and metrics."""
