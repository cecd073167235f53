"""Turns a run's log and results into tables, words, charts and a page."""
