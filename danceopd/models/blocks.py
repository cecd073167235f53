"""Finds the blocks of a transformer and their linear layers: one rule for FP8, int8, compiling, streaming and Muon."""

import inspect
import re
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


ATTENTION = re.compile(r"\.(attn\d?|attention)\.")
FEED_FORWARD = re.compile(r"\.(ff|ff_context|feed_forward|img_mlp|txt_mlp|proj_mlp|proj_out|(gate|up|down)_proj)(\.|$)")

PRESETS = ("attention", "attention+ffn", "all-linear")  # of layers that a student's adapter may change


def preset_layers(network: nn.Module, preset: str) -> list[str]:
    """Finds the linear layers that a preset stands for.

    Args:
        network: The transformer or UNet.
        preset: "attention", the layers of the blocks' attention; "attention+ffn", also those of their feed-forwards,
            gated ones too; or "all-linear", every linear layer of the network. Where a block has attention and
            feed-forward in one layer (FLUX.2's single blocks), "attention" has that layer.

    Returns:
        The layers' names, in the network's order.
    """
    if preset == "all-linear":
        return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    lists = (*block_lists(network), "mid_block")  # a UNet's block in the middle is in no list
    patterns = (ATTENTION, FEED_FORWARD) if preset == "attention+ffn" else (ATTENTION,)
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(tuple(f"{part}." for part in lists))
        and any(pattern.search(name) for pattern in patterns)
    ]


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
