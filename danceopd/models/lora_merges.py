"""Merges LoRAs without training, by PEFT's combinations, and says what rank their sum has."""

from collections.abc import Sequence
from functools import partial

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

from danceopd.models.lora_algebra import Lora, sum_loras, truncated

COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")

WEIGHTS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of each LoRA, of which the best is looked for

DENSITY = 0.5  # the share of entries that a combination keeps which prunes

SEED = 0  # dare drops entries at random

KEPT = 0.95  # of the sum's squared norm, by the automatic rank

_OF_FACTORS = {
    "linear": task_arithmetic,
    "ties": partial(ties, density=DENSITY),
    "dare_linear": partial(dare_linear, density=DENSITY),
    "dare_ties": partial(dare_ties, density=DENSITY),
    "magnitude_prune": partial(magnitude_prune, density=DENSITY),
}


@torch.no_grad()
def combined(loras: Sequence[Lora], combination: str, weights: Sequence[float]) -> Lora:
    """Merges LoRAs as PEFT's add_weighted_adapter does, by its own functions and without a model.

    `cat` is the exact weighted sum and `svd` its best cut to the largest rank; the others combine the factors A, and
    the factors B, each times the root of its weight. Smaller ranks, and layers that a LoRA leaves as they are, are
    filled up with zeros.

    Args:
        loras: The LoRAs.
        combination: One of COMBINATIONS.
        weights: Of each of them, not negative.

    Returns:
        The merge.

    Raises:
        ValueError: There is no such combination.
    """
    if combination not in COMBINATIONS:
        raise ValueError(f"unknown combination {combination!r}; use one of {', '.join(COMBINATIONS)}")
    weighted = [
        {name: (a, b, scale * weight) for name, (a, b, scale) in lora.items()}
        for lora, weight in zip(loras, weights, strict=True)
    ]
    if combination == "cat":
        return sum_loras(weighted)
    rank = max(len(a) for lora in loras for a, _, _ in lora.values())
    if combination == "svd":
        return {name: (*truncated(*factors, rank), 1.0) for name, factors in sum_loras(weighted).items()}
    merge, merged = _OF_FACTORS[combination], {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for name in dict.fromkeys(name for lora in loras for name in lora):
            a, b, scale = next(lora[name] for lora in loras if name in lora)
            none = (a.new_zeros(0, a.shape[1]), b.new_zeros(len(b), 0), scale)
            parts = [_filled(*lora.get(name, none), rank) for lora in loras]
            roots = torch.tensor(weights, dtype=torch.float32, device=a.device).sqrt()
            merged[name] = (merge([a for a, _ in parts], roots), merge([b for _, b in parts], roots), 1.0)
    return merged


def _filled(a: torch.Tensor, b: torch.Tensor, scale: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns factors of a rank, filled up with zeros; the scale is in both, where it is positive."""
    root = abs(scale) ** 0.5
    whole_a, whole_b = a.new_zeros(rank, a.shape[1]).float(), b.new_zeros(len(b), rank).float()
    whole_a[: len(a)] = a * root
    whole_b[:, : len(a)] = b * (root if scale > 0 else -root)
    return whole_a, whole_b


@torch.no_grad()
def automatic_rank(loras: Sequence[Lora]) -> int:
    """Finds the rank that suits several LoRAs, by the spectrum of the sum of what they change.

    It is the smallest r at which the best cuts of all layers' sums to rank r keep KEPT of the sums' squared norm, over
    all layers together: sum over layers of s_1^2 + ... + s_r^2 at least KEPT times that of all singular values.

    Args:
        loras: The LoRAs, weighted.

    Returns:
        The rank, at least 1.
    """
    spectra = [_squares(*factors) for factors in sum_loras(loras).values()]
    each = torch.zeros(max(map(len, spectra)), dtype=torch.float64)
    for squares in spectra:
        each[: len(squares)] += squares
    kept = each.cumsum(0)
    return max(1, int((kept < KEPT * kept[-1]).sum()) + 1) if kept[-1] > 0 else 1


def _squares(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns the squared singular values of scale b a, falling, by the product of the triangular parts."""
    r_a, r_b = torch.linalg.qr(a.double().mT).R, torch.linalg.qr(b.double()).R
    return torch.linalg.svdvals(r_b @ r_a.mT).square() * scale**2
