"""Sums, averages and cuts LoRAs."""

from collections.abc import Sequence

import torch
from torch import nn

Lora = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # by module: A [rank, in], B [out, rank], scale


def sum_loras(loras: Sequence[Lora]) -> Lora:
    """Returns several LoRAs as one, their exact sum: ranks add up, and scales are folded into B where modules are
    shared.
    """
    result = {}
    for name in dict.fromkeys(name for lora in loras for name in lora):
        parts = [lora[name] for lora in loras if name in lora]
        if len(parts) == 1:
            result[name] = parts[0]
        else:
            b = torch.cat([b.float() * scale for _, b, scale in parts], dim=1)
            result[name] = (torch.cat([a.float() for a, _, _ in parts]), b, 1.0)
    return result


def average(loras: Sequence[Lora]) -> Lora:
    """Returns the mean of what the LoRAs add, exactly: its rank is the sum of theirs."""
    return sum_loras([{name: (a, b, scale / len(loras)) for name, (a, b, scale) in lora.items()} for lora in loras])


@torch.no_grad()
def merge_into(transformer: nn.Module, lora: Lora) -> nn.Module:
    """Adds scale B A to a transformer's own weights, in float32, one layer at a time.

    Returns the transformer.
    """
    for name, (a, b, scale) in lora.items():
        weight = transformer.get_submodule(name).weight
        weight.copy_(added(weight, a, b, scale))
    return transformer


def added(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns weight + scale b a, summed in float32, in the weight's dtype."""
    change = scale * (b.to(weight.device).float() @ a.to(weight.device).float())
    return (weight.float() + change).to(weight.dtype)


def named_factors(lora: Lora, prefix: str = "") -> dict[str, torch.Tensor]:
    """Names an adapter's factors as PEFT does. Scales are folded into B: a file needs no metadata to be read
    right.
    """
    tensors = {}
    for name, (a, b, scale) in lora.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = (b * scale).contiguous()
    return tensors


def squared_norms(lora: Lora) -> dict[str, float]:
    """Returns |scale B A|^2, summed over entries, of each module, without the product itself: tr (B^T B) (A A^T)."""
    found = {}
    for name, (a, b, scale) in lora.items():
        a, b = a.double(), b.double()
        found[name] = scale**2 * ((b.mT @ b) * (a @ a.mT)).sum().item()
    return found


def cut(lora: Lora, rank: int) -> tuple[Lora, float]:
    """Cuts each module's change to a rank by SVD.

    Args:
        lora: Of any rank.
        rank: The largest wanted.

    Returns:
        The LoRA, the best of this rank, and the share |D - D_r| / |D| of the whole change's norm that it leaves out.
    """
    whole, short = squared_norms(lora), {}
    for name, factors in lora.items():
        a, b = truncated(*factors, rank)
        short[name] = (a, b, 1.0)
    kept, total = sum(squared_norms(short).values()), sum(whole.values())
    return short, max(0.0, 1 - kept / total) ** 0.5 if total else 0.0  # D_r is a projection of D


def truncated(a: torch.Tensor, b: torch.Tensor, scale: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts scale b a to a rank by the SVD of the n x n product of their triangular parts.

    Args:
        a: [n, in].
        b: [out, n].
        scale: Of their product.
        rank: The largest wanted.

    Returns:
        A [r, in] and B [out, r] in float32 whose product B A is the best of rank r <= `rank`; with n <= rank
        themselves, scaled. r is smaller where the product's rank is.
    """
    a, b = a.float(), b.float() * scale
    if len(a) <= rank:
        return a, b
    q_a, r_a = torch.linalg.qr(a.mT)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    r = min(rank, int((s > 1e-6 * s[0]).sum()))  # the rest is rounding
    root = s[:r].sqrt()
    return (root[:, None] * vh[:r]) @ q_a.mT, q_b @ (u[:, :r] * root)
