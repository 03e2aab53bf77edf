"""Helpers that several instruments share."""
