"""Puts a model's run together from files."""
