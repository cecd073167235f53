"""What a run takes, worked out without loading a weight."""
