"""Stores frozen transformers in FP8: e4m3 weights with a scale for each row, and inputs with a scale for each token.

The linear layers of the blocks are stored so. Those that modulate (adaLN) take their input, one vector a sample, as it
is: their weights are a third of some transformers, while their products are next to nothing. Embeddings, norms, biases
and all that lies outside the blocks stay in their own dtype. docs/fp8.md has the errors that this makes.
"""

import torch
from danceopd_kernels import fp8_linear, fp8_quantize_rowwise
from danceopd_kernels.dispatch import has_triton
from torch import nn

from danceopd.core.copies import ON_HOST
from danceopd.models.blocks import block_layers
from danceopd.support.errors import UserError

# Entries of a weight that are rounded at a time where PyTorch does it, some of them in float32; a kernel of the card's
# takes the whole weight in one pass, and makes nothing beside the codes.
PART = 2**18


class Fp8Linear(nn.Linear):
    """A frozen linear layer in FP8: x [..., in] in `dtype` -> [..., out], differentiable in x.

    On GPUs before sm_89, which do not multiply FP8, and in layers that modulate, x is multiplied as it is; elsewhere it
    is rounded to FP8 too (danceopd_kernels.fp8_linear). Under autocast the product is autocast's dtype, as nn.Linear's
    is, whatever dtype x has: a layer norm gives float32 there.

    Attributes:
        weight: [out, in] float8_e4m3fn.
        weight_scale: [out, 1] float32.
    """

    def __init__(self, linear: nn.Linear, modulates: bool):
        nn.Module.__init__(self)  # without new parameters
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.modulates, self.bias = linear.weight.dtype, modulates, linear.bias
        like = {"device": linear.weight.device}
        codes = torch.empty(linear.weight.shape, dtype=torch.float8_e4m3fn, **like)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", torch.empty(self.out_features, 1, **like))
        if not codes.is_meta:
            self.fill(linear.weight)

    @torch.no_grad()
    def fill(self, weight: torch.Tensor) -> None:
        """Rounds a weight [out, in] into the place of the old one."""
        one_pass = weight.device.type not in ON_HOST and has_triton()
        rows = len(weight) if one_pass else max(1, PART // weight.shape[1])
        for part, codes, scale in zip(*(t.split(rows) for t in (weight, self.weight, self.weight_scale)), strict=True):
            for place, value in zip((codes, scale), fp8_quantize_rowwise(part), strict=True):
                place.copy_(value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.detach()
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features, dtype=autocast_dtype(x))
        dtype = autocast_dtype(x)
        weight_only = self.modulates or None
        return fp8_linear(x, self.weight, self.weight_scale, bias, out_dtype=dtype, weight_only=weight_only)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """Tells the dtype in which autocast, if it is on where x lies, has a linear layer's product; else x's own."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on and x.dtype != torch.float64 else x.dtype


def numbers(weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the weight that codes stand for: codes * scale, in `dtype`."""
    return (weight.float() * weight_scale).to(dtype)


def check_fp8(device: torch.device | None) -> bool:
    """Checks that a device can use FP8; returns True, or raises UserError."""
    if device is not None and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip or capability < (8, 0):
            name, number = torch.cuda.get_device_name(device), ".".join(map(str, capability))
            raise UserError(
                f"fp8 needs an NVIDIA GPU of compute capability 8.0 or later, {name} has {number}; use int8, or leave "
                "it out"
            )
    return True


def to_fp8(transformer: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Stores the linear layers of a transformer's blocks in FP8, in place and one by one.

    Args:
        transformer: On the meta device too.
        device: Where each layer is converted and left; its own if not given.

    Returns:
        The transformer.
    """
    for name, linear, modulates in block_layers(transformer):
        transformer.set_submodule(name, Fp8Linear(linear.to(device), modulates))
    return transformer
