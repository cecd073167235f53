"""Puts a run together from files."""
