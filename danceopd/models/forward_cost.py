"""Counts what a forward computes: the operations of its products and attention, and its tokens."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Cost:
    """Says what forwards compute.

    Attributes:
        operations: Floating-point operations of linear layers, convolutions and attention; a multiplication and its
            addition are two. What an adapter adds is left out.
        tokens: Queries of the longest attention: the tokens of a sample's pictures and prompt.
    """

    operations: float
    tokens: float


class _Seen(TorchFunctionMode):
    """Notes every attention by torch, and whatever `attention` is told of."""

    def __init__(self):
        super().__init__()
        self.operations = self.tokens = 0
        self.told = False  # whether the attention under way is counted already

    def attention(self, samples: int, heads: int, queries: int, keys: int, width: int, value_width: int) -> None:
        self.operations += 2 * samples * heads * queries * keys * (width + value_width)
        self.tokens = max(self.tokens, queries)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and not self.told:
            query, key, value = _inputs(args, kwargs)  # [B, heads, tokens, width]
            samples, heads = math.prod(query.shape[:-3]), query.shape[-3]
            self.attention(samples, heads, *query.shape[-2:-1], key.shape[-2], query.shape[-1], value.shape[-1])
        return function(*args, **kwargs)

    def layer(self, module: nn.Module, _, output) -> None:
        """Is called after every module's forward."""
        if isinstance(module, nn.Linear):
            self.operations += 2 * output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            self.operations += 2 * output.numel() * module.in_channels // module.groups * math.prod(module.kernel_size)


def _inputs(args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Finds query, key and value among an attention's arguments."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    return [given[name] for name in ("query", "key", "value")]


@contextmanager
def _dispatched(seen: _Seen) -> Iterator[None]:
    """Notes attention by the kernels of diffusers' dispatcher too, of which torch does not see all."""
    dispatcher = sys.modules.get("diffusers.models.attention_dispatch")  # nobody else asks it
    kernels = dispatcher._AttentionBackendRegistry._backends if dispatcher else {}
    before = dict(kernels)

    def noting(kernel):
        def attend(*args, **kwargs):
            query, key, value = _inputs(args, kwargs)  # [B, tokens, heads, width]
            samples, queries, heads, width = query.shape
            seen.attention(samples, heads, queries, key.shape[1], width, value.shape[-1])
            seen.told = True
            try:
                return kernel(*args, **kwargs)
            finally:
                seen.told = False

        return attend

    kernels.update({name: noting(kernel) for name, kernel in before.items()})
    try:
        yield
    finally:
        kernels.update(before)


@torch.no_grad()
def forward_cost(forward: Callable[[], object]) -> Cost:
    """Counts what a forward without gradient computes, by the shapes that its layers see, whatever kernels run.

    Args:
        forward: Asks a network that is not compiled.

    Returns:
        The cost of all of its samples; the tokens of one.

    Example:
        >>> forward_cost(lambda: torch.nn.Linear(4, 3)(torch.zeros(5, 4)))
        Cost(operations=120, tokens=0)
    """
    seen = _Seen()
    hook = register_module_forward_hook(seen.layer)
    try:
        with _dispatched(seen), seen:
            forward()
    finally:
        hook.remove()
    return Cost(seen.operations, seen.tokens)
