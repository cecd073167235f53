"""Finds the blocks of a transformer and their linear layers: one rule for FP8, int8, compiling, streaming and Muon."""

from collections.abc import Iterator

from torch import nn


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
