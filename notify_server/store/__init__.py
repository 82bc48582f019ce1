"""The record: an inbox of what was accepted, and what is known of every batch and file."""
