"""The picture world whole: sprites, prompts, edits, detector and scores, its network and sources, and runs on it."""
