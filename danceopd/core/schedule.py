"""Noise levels of a trajectory."""

import torch


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Moves noise levels towards noise: shift s / (1 + (shift - 1) s), as in SD3 (arXiv 2403.03206, eq. 23).

    Args:
        sigma: Float tensor of any shape, in [0, 1].
        shift: The shift; 1 is none.

    Returns:
        Float tensor of the same shape.

    Example:
        >>> shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 3.0)
        tensor([0.0000, 0.7500, 1.0000])
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_grid(num_inference_steps: int, shift: float = 1.0) -> torch.Tensor:
    """Makes the noise levels of a rollout, from 1 (noise) down to 0 (data).

    Those of diffusers' FlowMatchEulerDiscreteScheduler(shift=shift) given sigmas linspace(1, 1 / N, N):

        sigma_i = shift s_i / (1 + (shift - 1) s_i),  s_i = 1 - i / N

    Args:
        num_inference_steps: Number N of steps.
        shift: The shift towards noise (SD3, arXiv 2403.03206, eq. 23); 1 is none.

    Returns:
        float32 tensor [N + 1].

    Raises:
        ValueError: If num_inference_steps < 1, or shift is not positive and finite.

    Example:
        >>> sigma_grid(4, shift=3.0)
        tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift must be positive and finite, got {shift}")
    return shift_sigma(torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64), shift).float()
