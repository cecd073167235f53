"""Training: the loop over updates and all that it needs."""
