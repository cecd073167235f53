"""Scores of the pictures of any pipeline."""
