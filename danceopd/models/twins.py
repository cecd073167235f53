"""Copies of a network with other parameters in the place of its own."""

import copy
from collections.abc import Callable

import torch
from torch import nn


def twin(module: nn.Module, make: Callable[[str, nn.Parameter], torch.Tensor]) -> nn.Module:
    """Makes a frozen copy with the parameters that make(name, parameter) gives.

    Nothing of the module's own is copied.
    """
    others = {id(p): nn.Parameter(make(name, p), requires_grad=False) for name, p in module.named_parameters()}
    return copy.deepcopy(module, others)


def without_values(module: nn.Module) -> nn.Module:
    """Makes a copy on the meta device, its parameters of whole shape where this rank has shards of them.

    Buffers are kept.
    """
    return twin(module, lambda name, p: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta"))
