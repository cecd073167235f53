"""Noise levels of a trajectory."""

import torch


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Move noise levels towards noise: shift * s / (1 + (shift - 1) * s), as in SD3 (arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_grid(num_inference_steps: int, shift: float = 1.0) -> torch.Tensor:
    """The noise levels of a rollout: [num_inference_steps + 1] float32, from 1 (noise) down to 0 (data).

    Equal to diffusers' FlowMatchEulerDiscreteScheduler(shift=shift) given sigmas linspace(1, 1 / N, N).
    Raises ValueError if num_inference_steps < 1 or shift is not positive and finite.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    return shift_sigma(torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64), shift).float()
