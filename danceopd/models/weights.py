"""Reads a network's weights a piece at a time: by ranks of which none has room for all, and to be written in shards."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from danceopd.models.loading import check_shapes, transformer_folder, weight_files
from danceopd.models.lora_algebra import Lora
from danceopd.models.tensor_files import check_finite, opened, read_header


@dataclass(frozen=True)
class Weights:
    """A network's weights, wherever they lie.

    Attributes:
        shapes: Of each tensor, by name.
        read: read(name, start, stop) gives these places of a tensor, flattened, on the CPU.
    """

    shapes: Mapping[str, torch.Size]
    read: Callable[[str, int, int], torch.Tensor]

    def tensor(self, name: str) -> torch.Tensor:
        """Reads a whole tensor."""
        shape = self.shapes[name]
        return self.read(name, 0, shape.numel()).reshape(shape)


def of_folder(folder: Path | str) -> Weights:
    """Reads the weights of a transformer that save_pretrained wrote, or of a pipeline's.

    A UserError says which file is bad, and what is read raises one where it is not finite.
    """
    shapes, places = {}, {}
    for file in weight_files(transformer_folder(folder)):
        for name, (_, shape) in read_header(file).items():
            shapes[name], places[name] = shape, file

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        first, last, skipped = _rows(shapes[name], start, stop)
        with opened(places[name]) as file:
            found = file.get_slice(name)[first:last] if shapes[name] else file.get_tensor(name)
        check_finite(places[name], name, found)
        return found.flatten()[skipped : skipped + stop - start]

    return Weights(shapes, read)


def of_tensors(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Returns the weights that tensors in memory are."""
    return Weights(
        {name: tensor.shape for name, tensor in tensors.items()},
        lambda name, start, stop: tensors[name].detach().flatten()[start:stop].cpu(),
    )


def either(first: Weights, second: Weights) -> Weights:
    """Returns the first weights, and of the second those that the first lack."""
    return Weights(
        {**second.shapes, **first.shapes},
        lambda name, *places: (first if name in first.shapes else second).read(name, *places),
    )


def plus(weights: Weights, lora: Lora) -> Weights:
    """Returns weights with a LoRA added: W + scale B A, in float32 where a layer has one."""

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        found = weights.read(name, start, stop)
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in lora:
            return found
        a, b, scale = lora[layer]
        first, last, skipped = _rows(weights.shapes[name], start, stop)
        change = scale * (b[first:last].float() @ a.float())
        return found.float() + change.flatten()[skipped : skipped + stop - start]

    return Weights(weights.shapes, read)


def mean(parts: list[tuple[float, Weights]]) -> Weights:
    """Returns the sum of share times weights, in float32; all are of the same shapes."""

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return sum(share * weights.read(name, start, stop).float() for share, weights in parts)

    return Weights(parts[0][1].shapes, read)


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Returns the shape of each tensor that a network is saved with."""
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def check_fits(weights: Weights, network: nn.Module, where: Path | str) -> None:
    """Raises UserError where weights are not those of this network (which may be on the meta device)."""
    check_shapes(weights.shapes, network, where)


PROBED, RELATED = 3, 0.5  # tensors that are compared; the cosine below which two networks have nothing in common


def likeness(one: Weights, other: Weights) -> float:
    """Compares two networks of one architecture by a few of their largest matrices, which alone are read.

    Weights that were trained from the same ones have a cosine near 1, those of another model near 0.

    Args:
        one: A network's.
        other: The other's.

    Returns:
        The largest cosine of the matrices read; 1 where the networks have none in common.
    """
    names = [n for n, s in one.shapes.items() if len(s) == 2 and other.shapes.get(n) == s and min(s) > 1]
    names = sorted(names, key=lambda name: one.shapes[name].numel())[-64:]
    found = []
    for name in names[:: max(1, len(names) // PROBED)][:PROBED]:
        a, b = (weights.tensor(name).flatten().double() for weights in (one, other))
        found.append((a @ b / (a.norm() * b.norm()).clamp(min=1e-30)).item())
    return max(found, default=1.0)


def _rows(shape: torch.Size, start: int, stop: int) -> tuple[int, int, int]:
    """Returns (first, last) row of a tensor in which these places of it lie, and the places of the first row before
    them.
    """
    width = shape[1:].numel()
    first = start // max(1, width)
    return first, math.ceil(stop / max(1, width)), start - first * width
