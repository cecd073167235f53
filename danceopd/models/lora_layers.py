"""Linear layers that add each sample's own adapter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from danceopd_kernels import pack_adapters, routed_lora_linear
from danceopd_kernels.lora import Adapters, frozen_linear, lora_linear
from torch import nn

from danceopd.models.eight_bit import as_multiplied
from danceopd.models.fp8 import numbers
from danceopd.models.nf4 import Nf4Linear, unpacked


class _Route:
    """Holds which adapter the rows of the forward now running ask; None is the base alone."""

    def __init__(self, stacked: int):
        self.stacked = stacked
        self.adapter: torch.Tensor | None = None  # [B] int64, or [1] for all rows
        self.same = False
        self.student: nn.Module | None = None  # whose adapter all rows ask instead
        self.backwards = False  # whether a backward is computing blocks again

    @contextmanager
    def of(
        self, adapter: torch.Tensor | None, same: bool, student: nn.Module | None = None, backwards: bool = False
    ) -> Iterator[None]:
        """Sets the adapter, or the student, for the forwards inside."""
        self.adapter, self.same, self.student, self.backwards = adapter, same, student, backwards
        try:
            yield
        finally:
            self.adapter = self.student = None
            self.backwards = False

    def again(self, within: Callable = nullcontext) -> tuple:
        """Gives the contexts of a block's forward and of its recomputation, when this forward is long over."""
        return nullcontext(), self._again(self.adapter, self.same, self.student, within)

    @contextmanager
    def _again(self, adapter, same: bool, student: nn.Module | None, within: Callable) -> Iterator[None]:
        with within(), self.of(adapter, same, student, backwards=True):
            yield


class _RoutedLinear(nn.Linear):
    """Holds a Linear's parameters and all sources' adapters; the forward takes its samples' from the route."""

    def __init__(self, name: str, linear: nn.Linear, adapters: Sequence[tuple], route: _Route):
        nn.Module.__init__(self)  # without new parameters
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.route = name, route
        self.dtype = dtype_of(linear)
        self.modulates, self.packed = getattr(linear, "modulates", False), isinstance(linear, Nf4Linear)
        self.register_buffer("weight_scale", getattr(linear, "weight_scale", None))
        self.register_buffer("lora_a", None, persistent=False)  # so it stays in a layer that only the student changes
        if any(len(a) for a, _, _ in adapters):
            packed = pack_adapters([(a, b) for a, b, _ in adapters])
            self.register_buffer("lora_a", packed.a, persistent=False)
            self.register_buffer("lora_b", packed.b, persistent=False)
            self.first, self.rank = tuple(packed.first.tolist()), packed.rank
            self.scale = tuple(scale for _, _, scale in adapters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        weight, weight_scale = as_multiplied(self.weight), self.weight_scale
        if self.packed:
            weight, weight_scale = unpacked(weight, weight_scale, self.dtype), None
        if self.modulates:  # its input stays as it is
            weight, weight_scale = numbers(weight, weight_scale, self.dtype), None
        if self.route.student is not None:
            return self.route.student.layer(self.name, x.to(self.dtype), weight, self.bias, weight_scale)
        adapter = self.route.adapter
        if adapter is None or self.lora_a is None:
            return frozen_linear(x, weight, self.bias, weight_scale)
        if self.route.same:
            rows = x.reshape(1, -1, x.shape[-1])  # whatever its axes mean
        else:
            copies, rest = divmod(len(x), len(adapter))
            if x.dim() < 2 or rest or copies not in (1, self.route.stacked):
                raise ValueError(
                    f"{self.name}: the first axis of its input {list(x.shape)} is not the batch of {len(adapter)}, so "
                    "its rows cannot be routed; ask each source alone (field), or leave this layer out of the LoRAs"
                )
            adapter = adapter if copies == 1 else adapter.repeat(copies)
            rows = x.reshape(len(x), -1, x.shape[-1])
        first = _constant(self.first, torch.int64, x.device)
        scale = _constant(self.scale, torch.float32, x.device)
        adapters = Adapters(self.lora_a, self.lora_b, first, scale, self.rank)
        out = routed_lora_linear(rows.to(self.dtype), weight, self.bias, adapters, adapter, weight_scale=weight_scale)
        return out.reshape(*x.shape[:-1], self.out_features)


class _Factors(nn.Module):
    """Adds one layer's part of a student's adapter: A [rank, in], B [out, rank], what they add times scale.

    It has a forward of its own, so that its parameters are there while it runs where DeepSpeed shards them.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float):
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x, weight, bias=None, weight_scale=None) -> torch.Tensor:
        return lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scale, weight_scale)


def dtype_of(linear: nn.Linear) -> torch.dtype:
    """Tells the dtype that a layer multiplies in; its weight may be stored in codes."""
    return getattr(linear, "dtype", linear.weight.dtype)


def _flat(name: str) -> str:
    """Makes a layer's name one that a ModuleDict takes."""
    return name.replace(".", "/")


@cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copies a small tensor to a device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
