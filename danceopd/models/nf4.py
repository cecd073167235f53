"""Stores frozen transformers in 4 bits: NF4 codes, two in a byte, and a scale for each 64 of a row.

NF4 is QLoRA's (arXiv 2305.14314): the 16 quantiles of a normal distribution. The linear layers of the blocks are stored
so and unpacked for each product, which is made in their own dtype. torchao has the format too, but unpacks through an
index of 8 bytes for each entry, and has no meta device. docs/fp8.md has the errors that this makes.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from danceopd.models.blocks import block_layers

# By bitsandbytes' numbers of appendix E of the paper.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64  # entries of a row with one scale; where a row is no multiple, the largest power of 2 that divides it
PART = 2**22  # entries that are rounded at a time


class Nf4Linear(nn.Linear):
    """A frozen linear layer in NF4: x [..., in] in `dtype` -> [..., out], differentiable in x.

    Attributes:
        weight: [out, in // 2] uint8, the codes.
        weight_scale: [out, in // block] bfloat16.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # without new parameters
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.bias = linear.weight.dtype, linear.bias
        codes, scale = packed(linear.weight.detach())
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, unpacked(self.weight, self.weight_scale, self.dtype), self.bias)


@torch.no_grad()
def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight to NF4.

    Args:
        weight: [out, in], in even.

    Returns:
        The codes [out, in // 2] uint8, the first of two in the upper bits, and the scales [out, in // block] bfloat16.
    """
    out, width = weight.shape
    block = math.gcd(width, BLOCK)
    codes = torch.empty(out, width // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(out, width // block, dtype=torch.bfloat16, device=weight.device)
    if weight.is_meta:
        return codes, scale
    levels = torch.tensor(LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    rows = max(1, PART // width)
    for part, own_codes, own_scale in zip(*(t.split(rows) for t in (weight, codes, scale)), strict=True):
        blocks = part.float().unflatten(1, (-1, block))
        most = blocks.abs().amax(2)
        own_scale.copy_(most)
        nearest = torch.bucketize(blocks / most.clamp_min(torch.finfo(torch.float32).tiny)[..., None], between)
        pairs = nearest.to(torch.uint8).reshape(len(part), -1, 2)
        own_codes.copy_(pairs[..., 0] << 4 | pairs[..., 1])
    return codes, scale


def unpacked(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the weight [out, in] that codes stand for, in `dtype`."""
    pairs = F.embedding(codes.int(), _pairs(dtype, codes.device))
    blocks = pairs.view(len(codes), scale.shape[1], -1)
    return blocks.mul_(scale.to(dtype)[..., None]).view(len(codes), -1)


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Lists the two levels of each byte: [256, 2]."""
    with torch.inference_mode(False):
        levels = torch.tensor(LEVELS, dtype=dtype)
        return torch.cartesian_prod(levels, levels).to(device)


def to_nf4(transformer: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Stores the linear layers of a transformer's blocks in NF4, in place and one by one.

    Args:
        transformer: On the meta device too.
        device: Where each layer is converted and left; its own if not given.

    Returns:
        The transformer.
    """
    for name, linear, _ in block_layers(transformer):
        if linear.in_features % 2 == 0:
            transformer.set_submodule(name, Nf4Linear(linear.to(device)))
    return transformer
