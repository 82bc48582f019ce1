"""Checks whether files are available: which addresses may be contacted, how they are requested, what the answers
mean.
"""
