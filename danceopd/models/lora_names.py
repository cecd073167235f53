"""Knows what LoRA files call a transformer's layers: diffusers' names, and those of the network as it was published."""

import difflib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

# What trainers and wrappers put in front of layers' names, also several times.
PREFIXES = ("base_model.model.", "base_model.", "transformer.", "diffusion_model.", "model.", "module.", "_orig_mod.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_", "lycoris_")  # of names with _ for every dot

ENCODERS = re.compile(r"(^|[._])(lora_te\d?|text_encoders?(_\d)?|clip_[lg]|t5xxl)(?=[._])")  # of text, not a network's

# {what it changes: (transformers that it is right for, how its keys look)}
FAMILIES = {
    "a UNet, as Stable Diffusion 1, 2 and XL have one": ((), r"(down|up|input|output)_blocks|mid(dle)?_block"),
    "Wan's transformer": ((), r"(^|[._])blocks[._]\d+[._](self|cross)_attn"),
    "HunyuanVideo's transformer": ((), r"double_blocks\.\d+\.(img|txt)_(attn_(qkv|proj)|mlp\.fc)"),
    "FLUX's transformer": (("Flux",), r"(double|single)_blocks|single_transformer_blocks"),
    "Stable Diffusion 3's transformer": (("SD3",), r"joint_blocks"),
    "Qwen-Image's transformer": (("QwenImage",), r"transformer_blocks[._]\d+[._](img|txt)_m(lp|od)"),
    "Z-Image's or Lumina's transformer": (("ZImage",), r"(noise|context)_refiner|(^|[._])layers[._]\d+[._]attention"),
}

# Of each published network its layers' names, block by block and outside of blocks, and the layers here whose rows each
# of them has.
ATTENTION = {
    f"{stream}_attn.{layer}": tuple(f"attn.{name}" for name in names)
    for stream, layers in {
        "img": {"qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",)},
        "txt": {"qkv": ("add_q_proj", "add_k_proj", "add_v_proj"), "proj": ("to_add_out",)},
    }.items()
    for layer, names in layers.items()
}
EMBEDDERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
FLUX_BLOCKS = {
    ("double_blocks", "transformer_blocks"): ATTENTION
    | {
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
    },
    ("single_blocks", "single_transformer_blocks"): {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
}
FLUX_REST = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
FLUX_TIME = {
    f"{old}.{layer}": f"time_text_embed.{new}.{name}"
    for old, new in {
        "time_in": "timestep_embedder",
        "vector_in": "text_embedder",
        "guidance_in": "guidance_embedder",
    }.items()
    for layer, name in EMBEDDERS.items()
}
LONGCAT_TIME = {f"time_in.{layer}": f"time_embed.timestep_embedder.{name}" for layer, name in EMBEDDERS.items()}
FLUX2_BLOCKS = {
    ("double_blocks", "transformer_blocks"): ATTENTION
    | {
        "img_mlp.0": ("ff.linear_in",),
        "img_mlp.2": ("ff.linear_out",),
        "txt_mlp.0": ("ff_context.linear_in",),
        "txt_mlp.2": ("ff_context.linear_out",),
    },
    ("single_blocks", "single_transformer_blocks"): {
        "linear1": ("attn.to_qkv_mlp_proj",),
        "linear2": ("attn.to_out",),
    },
}
FLUX2_REST = FLUX_REST | {
    f"{old}.{layer}": f"time_guidance_embed.{new}.{name}"
    for old, new in {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}.items()
    for layer, name in EMBEDDERS.items()
}
FLUX2_REST |= {
    f"{name}.lin": f"{name}.linear"
    for name in ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")
}
FLUX3_BLOCK = {
    "q_proj": ("attn.to_q",),
    "k_proj": ("attn.to_k",),
    "v_proj": ("attn.to_v",),
    "attn_out": ("attn.to_out.0",),
    "mlp_in": ("ff.linear_in",),
    "mlp_out": ("ff.linear_out",),
}
FLUX3_BLOCKS = {
    ("content_mode_blocks.image", "mode_blocks.image"): FLUX3_BLOCK,
    ("content_mode_blocks.image_cond", "mode_blocks.image_cond"): FLUX3_BLOCK,
    ("txt_mode_blocks", "txt_mode_blocks"): FLUX3_BLOCK,
    ("single_blocks", "single_transformer_blocks"): FLUX3_BLOCK,
}
SD3_BLOCKS = {
    ("joint_blocks", "transformer_blocks"): {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block.attn2.proj": ("attn2.to_out.0",),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "context_block.attn.proj": ("attn.to_add_out",),
        "x_block.mlp.fc1": ("ff.net.0.proj",),
        "x_block.mlp.fc2": ("ff.net.2",),
        "context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "context_block.mlp.fc2": ("ff_context.net.2",),
        "x_block.adaLN_modulation.1": ("norm1.linear",),
        "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    },
}
SD3_REST = {
    f"{old}.mlp.{i}": f"time_text_embed.{new}.{name}"
    for old, new in {"t_embedder": "timestep_embedder", "y_embedder": "text_embedder"}.items()
    for i, name in ((0, "linear_1"), (2, "linear_2"))
}
KREA2_BLOCK = {
    **{f"attn.{old}": (f"attn.{new}",) for old, new in {"wq": "to_q", "wk": "to_k", "wv": "to_v"}.items()},
    "attn.wo": ("attn.to_out.0",),
    "attn.gate": ("attn.to_gate",),
    **{f"mlp.{name}": (f"ff.{name}",) for name in ("gate", "up", "down")},
}
KREA2_BLOCKS = {
    ("blocks", "transformer_blocks"): KREA2_BLOCK,
    ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"): KREA2_BLOCK,
    ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"): KREA2_BLOCK,
}
KREA2_REST = {
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
}
Z_IMAGE_BLOCK = {"attention.qkv": tuple(f"attention.to_{x}" for x in "qkv"), "attention.out": ("attention.to_out.0",)}
Z_IMAGE_BLOCKS = {(name, name): Z_IMAGE_BLOCK for name in ("layers", "noise_refiner", "context_refiner")}
Z_IMAGE_REST = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
QWEN_IMAGE_21_BLOCKS = {  # ComfyUI fuses these two
    ("transformer_blocks", "transformer_blocks"): {"img_mlp.gate_up": ("img_mlp.gate_layer", "img_mlp.proj")}
}
SWAPPED = {"final_layer.adaLN_modulation.1": "norm_out.linear"}  # shift and scale, which diffusers has turned about
PUBLISHED = {
    "FluxTransformer2DModel": (FLUX_BLOCKS, FLUX_REST | FLUX_TIME),
    "Flux2Transformer2DModel": (FLUX2_BLOCKS, FLUX2_REST),
    "Flux3Transformer2DModel": (FLUX3_BLOCKS, {}),
    "LongCatImageTransformer2DModel": (FLUX_BLOCKS, FLUX_REST | LONGCAT_TIME),
    "SD3Transformer2DModel": (SD3_BLOCKS, SD3_REST | {"final_layer.linear": "proj_out"}),
    "ZImageTransformer2DModel": (Z_IMAGE_BLOCKS, Z_IMAGE_REST),
    "Krea2Transformer2DModel": (KREA2_BLOCKS, KREA2_REST),
    "QwenImage21Transformer2DModel": (QWEN_IMAGE_21_BLOCKS, {}),
}


def published_layers(transformer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Lists the layers of the network as it was published, where its names are not diffusers' own.

    Args:
        transformer: Of diffusers, on any device.

    Returns:
        {name: the transformer's linear layers whose rows it has, in turn}; a layer that stands there twice has its own
        second half first. Layers of the same names are not in it.
    """
    linear, kind = _linear(transformer), type(transformer).__name__
    blocks, rest = PUBLISHED.get(kind, ({}, {}))
    found = {}
    for (old, new), names in blocks.items():
        pattern = re.compile(rf"{re.escape(new)}\.(\d+)\.")
        for i in sorted({int(match[1]) for name in linear if (match := pattern.match(name))}):
            found |= {
                f"{old}.{i}.{name}": tuple(f"{new}.{i}.{layer}" for layer in layers) for name, layers in names.items()
            }
    found |= {old: (new,) for old, new in rest.items()}
    if kind.startswith(("FluxTransformer", "Flux2", "LongCat", "SD3")):
        found |= {old: (new, new) for old, new in SWAPPED.items()}
    if kind.startswith("SD3"):
        last = len(transformer.transformer_blocks) - 1
        found[f"joint_blocks.{last}.context_block.adaLN_modulation.1"] *= 2
    return {name: layers for name, layers in found.items() if linear.issuperset(layers)}


def in_order(layers: tuple[str, ...], rows: torch.Tensor) -> tuple[tuple[str, ...], torch.Tensor]:
    """Returns the layers, each once, and the rows with halves in diffusers' order."""
    if layers[1:] and layers[0] == layers[1]:
        return layers[:1], torch.cat(rows.chunk(2)[::-1])
    return layers, rows


def _linear(transformer: nn.Module) -> set[str]:
    return {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def known_layers(transformer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Lists the names that files have for a transformer's linear layers.

    Returns:
        {name: layers}: the layers' own names, those of the published network (of its fused layers also with .0, .1 for
        the parts of each), and of attention also the names that diffusers fuses it under; and each name once more with
        _ for every dot.
    """
    widths = {name: transformer.get_submodule(name).in_features for name in _linear(transformer)}
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in widths}
    for name, layers in published_layers(transformer).items():
        found.setdefault(name, layers)
        for i, layer in enumerate(layers) if len(set(layers)) > 1 else ():  # OneTrainer's parts of a fused layer
            found.setdefault(f"{name}.{i}", (layer,))

    def also(name: str, *layers: str) -> None:
        if widths.keys() >= set(layers) and len({widths[layer] for layer in layers}) == 1:  # not of cross attention
            found.setdefault(name, layers)

    for parent in sorted({name.rpartition(".")[0] for name in widths if name.endswith((".to_q", ".add_q_proj"))}):
        own, added = [f"{parent}.to_{x}" for x in "qkv"], [f"{parent}.add_{x}_proj" for x in "qkv"]
        for fused in ("qkv", "to_qkv"):
            also(f"{parent}.{fused}", *own)
        for fused in ("add_qkv_proj", "to_added_qkv"):
            also(f"{parent}.{fused}", *added)
        for x, layer in zip("qkv", own, strict=True):
            also(f"{parent}.to.{x}", layer)
        for name in ("out", "to_out"):
            also(f"{parent}.{name}", f"{parent}.to_out.0")
    return {name.replace(".", "_"): layers for name, layers in found.items()} | found


def layers_of(name: str, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Returns the layers that a file's name stands for, with any of the prefixes, however often; None for none."""
    if name in known:
        return known[name]
    prefixes = FLAT_PREFIXES if "." not in name else PREFIXES
    # One prefix may begin another: lora_transformer_blocks_0 is a layer of transformer_blocks behind "lora_".
    found = (layers_of(name.removeprefix(prefix), known) for prefix in prefixes if name.startswith(prefix))
    return next((layers for layers in found if layers), None)


def whose(keys: Iterable[str], transformer: nn.Module) -> str | None:
    """Says what network keys that a transformer does not have are of, where their names show it."""
    keys, own = list(keys), type(transformer).__name__
    keys = [key for key in keys if not ENCODERS.search(key)] or keys
    for what, (classes, pattern) in FAMILIES.items():
        found = sum(bool(re.search(pattern, key)) for key in keys)
        if 2 * found > len(keys) and not own.startswith(classes or ("no",)):
            return f"its keys are those of {what}"
    return None


def nearest(name: str, known: Mapping[str, tuple[str, ...]]) -> str | None:
    """Says what is near a layer's name that is not known: the same behind another prefix, or one spelled alike."""
    for at in (match.end() for match in re.finditer(r"\.", name)):
        if name[at:] in known:
            return f"the prefix {name[:at]!r} is none that is known; without it {name[at:]} is a layer there"
    for prefix in (*PREFIXES, *FLAT_PREFIXES):
        name = name.removeprefix(prefix)
    for match in re.finditer(r"(?<=[._])\d{1,3}(?=[._])", name):
        kinds = (f"{name[: match.start()]}{i}{name[match.end() :]}" for i in range(int(match[0])))
        if there := sum(kind in known for kind in kinds):
            return f"it has such blocks 0 to {there - 1} and no {name}, so that the file is of a larger model"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"the nearest layers to {name} are {', '.join(near)}" if near else None
