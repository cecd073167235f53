"""Writes a transformer as diffusers does."""

import json
import os
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from uuid import uuid4

import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from danceopd.models.weights import Weights
from danceopd.support.errors import UserError
from danceopd.support.files import sync, write_atomic


def save_transformer(transformer: nn.Module, weights: Weights, folder: Path) -> None:
    """Writes a transformer as its save_pretrained does, over an older one: a process that dies leaves either whole.

    The shards get names of their own each time, and the index that names them is replaced in one move.

    Args:
        transformer: Of diffusers, on any device.
        weights: What it holds, in float32.
        folder: Where to.

    Raises:
        UserError: The disk is full or the folder read-only; what was there before stays good.
    """
    temporary = folder / ".new"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_pretrained(transformer, weights, temporary, torch.float32)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write {folder}: {error}; what was written there before is still good. Make room or choose another "
            "training.output_dir, then run the same command again"
        ) from error
    index = temporary / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
    else:  # one file, which diffusers reads through an index too
        size = 4 * sum(shape.numel() for shape in weights.shapes.values())
        names = dict.fromkeys(weights.shapes, SAFETENSORS_WEIGHTS_NAME)
        content = {"metadata": {"total_size": size}, "weight_map": names}
    tag = uuid4().hex[:8]
    names = {old: f"{tag}-{old}" for old in sorted(set(content["weight_map"].values()))}
    for old, new in names.items():
        sync(temporary / old)
        os.replace(temporary / old, folder / new)
    content["weight_map"] = {key: names[old] for key, old in content["weight_map"].items()}
    write_atomic(folder / "config.json", (temporary / "config.json").read_bytes())
    write_atomic(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(content, indent=2, sort_keys=True).encode())
    shutil.rmtree(temporary)
    for file in folder.glob("*.safetensors"):
        if file.name not in names.values():
            file.unlink()


SHARD = "5GB"  # of a file that is written, and so what is in memory at a time


def save_pretrained(
    network: nn.Module,
    weights: Weights,
    folder: Path,
    dtype: torch.dtype,
    narrow: Container[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes what the network's save_pretrained would with these weights, one file's in memory at a time.

    Args:
        network: Of diffusers, on any device: its names, shapes and configuration are read.
        weights: What it holds.
        folder: Where to.
        dtype: Of what is written.
        narrow: Names of tensors that are rounded to float8_e4m3fn instead.
        metadata: Of the files, beside their format.

    Raises:
        OSError, SafetensorError: The disk is full or the folder read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {
        name: torch.float8_e4m3fn if name in narrow else dtype if tensor.is_floating_point() else tensor.dtype
        for name, tensor in network.state_dict().items()
    }
    state = {name: torch.empty(weights.shapes[name], dtype=kind, device="meta") for name, kind in kinds.items()}
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: _rounded(weights.tensor(name), kinds[name]) for name in names}
        save_file(tensors, folder / file, {"format": "pt", **(metadata or {})})
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    network.save_config(folder)


def _rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds a tensor to a dtype; what float8_e4m3fn cannot hold becomes its largest number and not NaN."""
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max
        value = value.clamp(-largest, largest)
    return value.to(dtype)
