"""A network's weights, read a piece at a time: by ranks of which none has room for all, and to be written in shards."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from danceopd.backbones.loading import transformer_folder, weight_files
from danceopd.errors import UserError
from danceopd.lora import Lora
from danceopd.training.state import Checkpoint

SHARD = "5GB"  # of a file that is written, and so what is in memory at a time


@dataclass(frozen=True)
class Weights:
    """shapes: of each tensor, by name; read(name, start, stop): these places of it, flattened, on the CPU."""

    shapes: Mapping[str, torch.Size]
    read: Callable[[str, int, int], torch.Tensor]

    def tensor(self, name: str) -> torch.Tensor:
        """A whole one."""
        shape = self.shapes[name]
        return self.read(name, 0, shape.numel()).reshape(shape)


def of_folder(folder: Path | str) -> Weights:
    """Of a transformer that save_pretrained wrote, or of a pipeline's. Raises UserError for files that are not good."""
    shapes, places = {}, {}
    for file in weight_files(transformer_folder(folder)):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shapes[name], places[name] = torch.Size(opened.get_slice(name).get_shape()), file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: cannot be read as safetensors, copy it again: {error}") from error

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        first, last, skipped = _rows(shapes[name], start, stop)
        with safe_open(places[name], framework="pt") as opened:
            found = opened.get_slice(name)[first:last] if shapes[name] else opened.get_tensor(name)
        return found.flatten()[skipped : skipped + stop - start]

    return Weights(shapes, read)


def of_tensors(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Of tensors in memory."""
    return Weights(
        {name: tensor.shape for name, tensor in tensors.items()},
        lambda name, start, stop: tensors[name].detach().flatten()[start:stop].cpu(),
    )


def of_checkpoint(checkpoint: Checkpoint, prefix: str) -> Weights:
    """Of a run's checkpoint, those whose names begin so."""
    return Weights(
        {n.removeprefix(prefix): shape for n, shape in checkpoint.shapes.items() if n.startswith(prefix)},
        lambda name, start, stop: checkpoint.slice(prefix + name, start, stop),
    )


def either(first: Weights, second: Weights) -> Weights:
    """The first's, and the second's of what the first has not."""
    return Weights(
        {**second.shapes, **first.shapes},
        lambda name, *places: (first if name in first.shapes else second).read(name, *places),
    )


def plus(weights: Weights, lora: Lora) -> Weights:
    """W + scale B A, in float32 where a layer has a LoRA."""

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
    """The sum of share times weights, in float32; all of the same shapes."""

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return sum(share * weights.read(name, start, stop).float() for share, weights in parts)

    return Weights(parts[0][1].shapes, read)


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Of each tensor that a network is saved with."""
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def check_fits(weights: Weights, network: nn.Module, where: Path | str) -> None:
    """Raises UserError where weights are not those of this network (which may be on the meta device)."""
    expected = shapes_of(network)
    if missing := sorted(expected.keys() - weights.shapes.keys()):
        raise UserError(f"{where}: the weights lack {len(missing)} tensors, such as {missing[0]}; copy them again")
    for name, shape in expected.items():
        if weights.shapes[name] != shape:
            raise UserError(
                f"{where}: {name} is {list(weights.shapes[name])} in the file and {list(shape)} by config.json; copy "
                "the folder again"
            )


def save_pretrained(network: nn.Module, weights: Weights, folder: Path, dtype: torch.dtype) -> None:
    """Write what the network's save_pretrained would with these weights in this dtype, one file's in memory at a time.

    network: of diffusers, on any device: its names, shapes and configuration are read. Raises OSError and
    SafetensorError where the disk is full or the folder read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="meta")
        for name, tensor in network.state_dict().items()
    }
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: weights.tensor(name).to(state[name].dtype) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    network.save_config(folder)


def _rows(shape: torch.Size, start: int, stop: int) -> tuple[int, int, int]:
    """(first, last) row of a tensor in which these places of it lie, and the places of the first row before them."""
    width = shape[1:].numel()
    first = start // max(1, width)
    return first, ceil(stop / max(1, width)), start - first * width
