"""The record: the inbox of accepted notifications, and the state of every batch and file."""
