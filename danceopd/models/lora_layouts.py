"""Names an adapter's factors as other tools do: PEFT, ComfyUI and kohya's trainers."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from danceopd.models.lora_algebra import Lora, named_factors
from danceopd.models.lora_files import FILES
from danceopd.models.lora_names import published_layers
from danceopd.support.errors import UserError

# Each layout and family has what stands before a layer's name, and whether that name is the published network's.
# "lora_unet_" (of "unet") and "diffusion_model." before published names are read for every network that ComfyUI has;
# others are those of its key map (comfy/lora.py). kohya's files of Qwen-Image and Z-Image are musubi-tuner's.
LAYOUTS = {
    "comfyui": {
        "sd3": ("transformer", False),
        "flux": ("transformer", False),
        "flux2": ("diffusion_model", True),
        "flux3": ("diffusion_model", True),
        "qwen_image": ("diffusion_model", False),
        "qwen_image_21": ("diffusion_model", False),
        "z_image": ("diffusion_model", False),
        "krea2": ("diffusion_model", False),
        "longcat_image": ("diffusion_model", True),
    },
    "kohya": {
        "sd3": ("unet", True),
        "flux": ("unet", True),
        "flux2": ("unet", True),
        "qwen_image": ("unet", False),
        "qwen_image_21": ("unet", True),
        "z_image": ("unet", False),
        "krea2": ("unet", True),
        "longcat_image": ("unet", True),
    },
}

SAME_NAMES = ("qwen_image_21",)  # whose layers have diffusers' names where published_layers has none


def layouts_of(family: str) -> list[str]:
    """Returns the layouts that an adapter of a family can be written in."""
    return ["diffusers", "peft", *(name for name, families in LAYOUTS.items() if family in families)]


def in_layout(lora: Lora, transformer: nn.Module, layout: str, family: str) -> dict[str, torch.Tensor]:
    """Names factors as ComfyUI or kohya's trainers do; B holds the scales.

    Layers that are one in the published network become one: A of all of them below each other, B with blocks of zeros,
    so that the change is the same and the rank their sum.

    Args:
        lora: The adapter.
        transformer: Whose layers it changes, on any device.
        layout: "comfyui" or "kohya".
        family: Of danceopd.models.backbones.

    Returns:
        The tensors by key, in the factors' dtype.

    Raises:
        UserError: No tool is known to read this layout of the family, or a layer has no name in it.
    """
    try:
        prefix, published = LAYOUTS[layout][family]
    except KeyError:
        raise UserError(
            f"no tool is known that reads the {layout} layout of {family}; use --layout "
            f"{' or '.join(layouts_of(family))}, or --merge"
        ) from None
    if published:
        lora = _published(lora, transformer, family)
    tensors = named_factors(lora, f"{prefix}.")
    return convert_state_dict_to_kohya(tensors) if layout == "kohya" else tensors


def _published(lora: Lora, transformer: nn.Module, family: str) -> Lora:
    """Returns an adapter by the published network's layers."""
    left, found = dict(lora), {}
    for name, layers in published_layers(transformer).items():
        there = [layer for layer in dict.fromkeys(layers) if layer in left]
        if not there:
            continue
        parts = {layer: left.pop(layer) for layer in there}
        if len(layers) == 1:
            found[name] = parts[layers[0]]
            continue
        a = torch.cat([part[0] for part in parts.values()])
        rows, before = [], 0
        for layer in dict.fromkeys(layers):
            own_a, own_b, scale = parts.get(layer, (a[:0], None, 1.0))
            out = transformer.get_submodule(layer).out_features
            b = a.new_zeros(out, len(a))
            if own_b is not None:
                b[:, before : before + len(own_a)] = own_b * scale
            before += len(own_a)
            rows.append(b)
        b = torch.cat(rows)
        if len(rows) < len(layers):  # a layer whose halves diffusers has swapped
            b = torch.cat(b.chunk(2)[::-1])
        found[name] = (a, b, 1.0)
    if family in SAME_NAMES:
        return found | left
    if left:
        raise UserError(
            f"{', '.join([*left][:3])} has no name in the published {family}; use --layout diffusers, or --merge"
        )
    return found


def save_peft(lora: Lora, folder: Path, base: str | None, metadata: Mapping[str, str]) -> Path:
    """Writes an adapter as PEFT does: adapter_model.safetensors and adapter_config.json.

    Args:
        lora: The adapter.
        folder: Where to; it is there.
        base: The hub's name of the model, or None.
        metadata: Of the file.

    Returns:
        The file of the weights.
    """
    ranks = {name: len(a) for name, (a, _, _) in lora.items()}
    usual = max(ranks.values(), key=[*ranks.values()].count)
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=sorted(lora),
        rank_pattern=others,
        alpha_pattern=dict(others),  # B holds the scales
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(named_factors(lora, "base_model.model."), folder / FILES[0], {"format": "pt", **metadata})
    return folder / FILES[0]
