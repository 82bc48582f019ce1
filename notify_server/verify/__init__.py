"""Asking every address whether its file is there: what may be dialled, how it is asked, what the answers mean."""
