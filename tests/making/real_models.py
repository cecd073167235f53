"""Folders of the models that configs/models is for, at their real sizes: nothing in them is read but headers."""

import json
import math
import os
import struct
from pathlib import Path

import diffusers
import torch
from model_runs import FAMILIES, MORE
from released import MODELS, prompt_of

from danceopd.config.reading import load_config
from danceopd.data.cache import Cache, key_of
from danceopd.models.backbones import backbone_of, meta_transformer
from danceopd.models.shared_base import target_layers

CONFIGS = Path("configs/models")
MADE = FAMILIES | MORE


def model_of(config: Path) -> str:
    return next(name for name in MODELS if config.stem.startswith(name + "-"))


def write_header(path: Path, transformer, layers, rank: int) -> Path:
    """A LoRA file with a header, a number in each factor, and a hole for the others."""
    entries, end, starts = {}, 0, []
    for name in layers:
        linear = transformer.get_submodule(name)
        for side, shape in (("A", [rank, linear.in_features]), ("B", [linear.out_features, rank])):
            first, end = end, end + 2 * math.prod(shape)
            starts.append(first)
            key = f"transformer.{name}.lora_{side}.weight"
            entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, end]}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + end)
    with open(path, "r+b") as file:
        for start in starts:
            file.seek(8 + len(header) + start)
            file.write(b"\x80\x3f")  # 1 in bfloat16
    return path


def write_rows(folder: Path, prompts: list[dict], shape, size: int) -> Path:
    """Prepared rows of every capability that the configurations name; prompts: of one without and with a picture."""
    cache, keys, picture = Cache(folder), [key_of("prompt"), key_of("prompt", "seen")], key_of("picture")
    cache.write(dict(zip(keys, prompts, strict=True)) | {picture: {"latents": torch.zeros(*shape)}})
    lines = [{"model": "m", "negative_prompts": {"": keys[0]}}]
    for name, edits in (("t2i", 0), ("style", 0), ("cfg", 0), ("edit", 1), ("local", 1), ("global", 1)):
        row = {"id": name, "capability": name, "prompt": keys[edits], "sources": [picture] * edits, "target": None}
        lines.append({**row, "size": [size, size], "source_sizes": [[size, size]] * edits})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def overrides(config: Path, root: Path) -> list[str]:
    """The paths of a configuration, on the command line."""
    loaded = load_config(config)
    result = [f"model={root / 'model'}", f"training.output_dir={root / 'run'}"]
    result += [f"capabilities.{name}.data.prepared={root / 'cache' / 'rows.jsonl'}" for name in loaded.capabilities]
    lora = root / "lora.safetensors"
    result += [f"sources.{name}.lora=[{{path: {lora}}}]" for name, source in loaded.sources.items() if source.lora]
    return result


def real_place(root: Path, model: str) -> Path:
    """The model's folder at its real size, with empty files for weights."""
    family, config, _ = MODELS[model]
    MADE[family](root / "model")
    folder = root / "model" / "transformer"
    cls = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    with torch.device("meta"):
        cls(**config).save_config(folder)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    vae = root / "model" / "vae" / "config.json"
    channels = {
        "latent_channels": 32 if model[:6] in ("flux.2", "flux.3") else 16,
        "z_dim": 64 if "2.1" in model else 16,
    }
    vae.write_text(json.dumps(json.loads(vae.read_text()) | channels))
    finish(root, family, size=1024, rank=128, length=333 if family == "sd3" else 512)
    return root


def finish(root: Path, family: str, size: int, rank: int, length: int) -> None:
    backbone = backbone_of(root / "model")
    transformer = meta_transformer(root / "model", backbone, torch.bfloat16)
    layers = target_layers(transformer, backbone.LORA_TARGETS, every=False)
    write_header(root / "lora.safetensors", transformer, layers, rank)
    seen = (size // 32) ** 2 if backbone.PROMPTS_SEE_PICTURES and "edit" in backbone.tasks(root / "model") else 0
    prompts = [
        {key: value.bfloat16() if value.is_floating_point() else value for key, value in prompt.items()}
        for prompt in (prompt_of(family, transformer, length + more, slots=more) for more in (0, seen))
    ]
    write_rows(root / "cache", prompts, backbone.latent_shape(root / "model", size, size), size)
