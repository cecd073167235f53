"""Finds the blocks of a transformer and their linear layers: one rule for FP8, int8, compiling, streaming and Muon."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from danceopd.support.errors import UserError

MAIN = (
    "transformer_blocks",
    "layers",
    "blocks",
)  # the list whose blocks skip-layer guidance numbers, as diffusers does


def block_lists(network: nn.Module) -> dict[str, nn.ModuleList]:
    """Returns the lists of repeated blocks at a network's top, by name: most of diffusers' have one or two.

    FLUX.3's has a list for each kind of token, in a dict.
    """
    found = {}
    for name, child in network.named_children():
        inside = {f"{name}.{key}": part for key, part in child.items()} if isinstance(child, nn.ModuleDict) else {}
        found |= {key: part for key, part in ({name: child} | inside).items() if isinstance(part, nn.ModuleList)}
    return found


def blocks(network: nn.Module) -> list[nn.Module]:
    """Returns the repeated blocks of a network in the order of a forward."""
    return [block for blocks in block_lists(network).values() for block in blocks]


def block_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear, bool]]:
    """Finds the linear layers in a network's blocks.

    Yields:
        The layer's name in the network, the layer, and whether it modulates (adaLN): whether its input is one vector a
        sample, the embedding of noise level and prompt, instead of one a token.
    """
    prefixes = tuple(f"{name}." for name in block_lists(network))
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(prefixes):
            yield name, module, any(part in name for part in ("norm", "mod"))


def main_blocks(network: nn.Module, layers: Sequence[int]) -> nn.ModuleList:
    """Finds the list of blocks that skip-layer guidance numbers.

    Args:
        network: The transformer.
        layers: The numbers of blocks that must be in it.

    Returns:
        The list.

    Raises:
        UserError: The list is not as long.
    """
    lists = block_lists(network)
    name = next(name for name in MAIN if name in lists)
    if wrong := [i for i in layers if i >= len(lists[name])]:
        raise UserError(f"{type(network).__name__} has {len(lists[name])} {name}, counted from 0, and no {wrong[0]}")
    return lists[name]


class _Skipped(nn.Module):
    """Stands in a block's place and gives back what the block was given."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self._parameters_of = inspect.signature(type(block).forward)

    def forward(self, *args, **kwargs):
        given = self._parameters_of.bind(None, *args, **kwargs).arguments
        _, first, *_ = given.values()
        prompt = given.get("encoder_hidden_states")
        return first if prompt is None else (prompt, given["hidden_states"])  # the order of all blocks with two streams


@contextmanager
def _leaving_out(blocks: nn.ModuleList, layers: Sequence[int]) -> Iterator[None]:
    kept = {i: blocks[i] for i in layers}
    try:
        for i, block in kept.items():
            blocks[i] = _Skipped(block)
        yield
    finally:
        for i, block in kept.items():
            blocks[i] = block


def without_blocks(field: Callable, network: nn.Module, layers: Sequence[int]) -> Callable:
    """Asks a network without some of its blocks, as skip-layer guidance does.

    Args:
        field: Asks the network.
        network: The transformer that it asks.
        layers: The numbers of the blocks in the main list.

    Returns:
        The field.

    Raises:
        UserError: The network has no such block.
    """
    blocks = main_blocks(network, layers)

    def velocity(latents, sigma, conditioning):
        with _leaving_out(blocks, layers):
            return field(latents, sigma, conditioning)

    return velocity
