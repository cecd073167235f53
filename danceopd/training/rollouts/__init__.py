"""Rollouts of static steps, captured on CUDA, and replicas of the student that they ask."""
