"""Diffusers models: families, LoRA, low precision, weights."""
