"""GEdit-Bench: its rows, drawing, judging and scoring."""
