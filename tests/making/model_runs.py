"""Runs on tiny models of every family: LoRAs, prepared rows and configurations.

The fixtures `places` and `prepared_places` (tests/conftest.py) keep one folder a family, made once.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_dreamlite
import tiny_flux
import tiny_flux2
import tiny_flux3
import tiny_krea2
import tiny_longcat_image
import tiny_prx
import tiny_qwen_image
import tiny_qwen_image_21
import tiny_sd3
import tiny_z_image
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, Flux2KleinPipeline, ModularPipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from released import prompt_of
from safetensors.torch import save_file

from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.data.cache import Cache, key_of
from danceopd.data.prepare import prepare
from danceopd.models.backbones import backbone_of
from danceopd.models.loading import transformer_folder
from danceopd.models.lora_files import loads_loras
from danceopd.models.shared_base import target_layers

FAMILIES = {
    "sd3": tiny_sd3.save_tiny,
    "flux": lambda folder: tiny_flux.save_tiny(folder, pipeline="FluxPipeline"),
    "kontext": tiny_flux.save_tiny,
    "klein": tiny_flux2.save_tiny,
    "flux2": lambda folder: tiny_flux2.save_tiny(folder, dev=True),
    "qwen": tiny_qwen_image.save_tiny,
    "qwen_edit": lambda folder: tiny_qwen_image.save_tiny(folder, edit=True),
    "z": tiny_z_image.save_tiny,
}
# Those whose own way from files to files is tested, and what their transformers share with the others is not again.
MORE = {
    "z_omni": tiny_z_image.save_tiny_omni,
    "qwen_21": tiny_qwen_image_21.save_tiny,
    "longcat": tiny_longcat_image.save_tiny,
    "longcat_edit": lambda folder: tiny_longcat_image.save_tiny(folder, edit=True),
    "krea2": tiny_krea2.save_tiny,
    "prx": tiny_prx.save_tiny,
    "dreamlite": tiny_dreamlite.save_tiny,
    "flux3": tiny_flux3.save_tiny,
}
EDITING = {"kontext", "klein", "qwen_edit", "z_omni", "qwen_21", "longcat_edit", "dreamlite", "flux3"}
EMBEDDED = {  # of the families that take their guidance as an input
    family: {f"{key}.embedded_guidance": 3.5 for key in ("student", "sources.one", "sources.two")}
    for family in ("flux", "kontext", "flux2")
}
SIZE = 64  # pixels of write_rows' pictures
PREPARED_SIZE = 32  # pixels of prepare_place's


# ------------------------------------------------------------------------------------ rows of random encodings


def write_rows(
    folder: Path, family: str, transformer, shape, capabilities: dict[str, str], size: int = SIZE, length: int = 24
) -> Path:
    """Writes prepared rows of capabilities {name: task} as `danceopd data prepare` does, of random encodings."""
    cache, prompt, picture = Cache(folder), key_of("prompt"), key_of("picture")
    slots = 4 if family == "z_omni" and "edit" in capabilities.values() else 0  # the others may have none
    cache.write({prompt: prompt_of(family, transformer, length, slots), picture: {"latents": torch.randn(*shape)}})
    lines = [{"model": "m", "negative_prompts": {"": prompt}}]
    for name, task in capabilities.items():
        sources = [picture] if task == "edit" else []
        row = {"capability": name, "prompt": prompt, "sources": sources, "target": None, "size": [size, size]}
        row["source_sizes"] = [[size, size] for _ in sources]
        lines += [{"id": str(i), **row} for i in range(3)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_lora(path: Path, transformer, layers: list[str], rank: int) -> Path:
    """Writes a random LoRA in PEFT's layout."""
    tensors = {}
    for name in layers:
        linear = transformer.get_submodule(name)
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, linear.in_features) * 0.1
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(linear.out_features, rank) * 0.1
    save_file(tensors, path)
    return path


def write_place(root: Path, family: str) -> Path:
    """Writes model, two LoRAs of ranks 2 and 3, other/ and other.safetensors of other weights, and prepared rows."""
    model = FAMILIES[family](root / "model")
    backbone = backbone_of(model)
    transformer = backbone.load_transformer(model)
    layers = target_layers(transformer, backbone.LORA_TARGETS, every=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for rank, name in ((2, "one"), (3, "two")):
            write_lora(root / f"{name}.safetensors", transformer, layers[rank:], rank)
        shape = backbone.latent_shape(model, SIZE, SIZE)
        write_rows(root / "cache", family, transformer, shape, {"one": "t2i", "two": "t2i"})
    generator = torch.Generator().manual_seed(5)
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    transformer.save_pretrained(root / "other", max_shard_size="40KB")
    save_file(transformer.state_dict(), root / "other.safetensors")
    return root


# ------------------------------------------------------------------------ adapters by diffusers, rows by prepare


def plain_pipeline(model: Path):
    """The pipeline of a folder by diffusers alone; FLUX.3's is of blocks, without the one that writes prompts anew."""
    if (model / "model_index.json").is_file():
        pipeline = DiffusionPipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline
    blocks = ModularPipeline.from_pretrained(str(model)).blocks
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = blocks.init_pipeline(str(model))
    pipeline.load_components(dtype=torch.float32)
    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    return pipeline


def save_teacher(model: Path, folder: Path, seed: int) -> None:
    """Writes a random LoRA far from the base, by diffusers; those of all seeds have something in common."""
    pipeline = plain_pipeline(model)
    transformer = getattr(pipeline, transformer_folder(model).name)
    layers = target_layers(transformer, backbone_of(model).LORA_TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=layers), transformer)
    common, own = torch.Generator().manual_seed(10), torch.Generator().manual_seed(seed)
    for name, value in transformer.named_parameters():
        if "lora_B" in name:
            value.data = 2 * torch.randn(value.shape, generator=common) + 0.5 * torch.randn(value.shape, generator=own)
    factors = {
        name.replace(".default", ""): value for name, value in transformer.state_dict().items() if "lora_" in name
    }
    if loads_loras(type(pipeline)):
        pipeline.save_lora_weights(folder, transformer_lora_layers=factors)
    else:
        folder.mkdir()
        save_file({f"transformer.{name}": value for name, value in factors.items()}, folder / "lora.safetensors")


def prepare_place(root: Path, family: str) -> Path:
    """Writes model, two teachers one/ and two/, and prepared rows of capabilities one and two.

    The second capability edits where the family does; the other rows have finished pictures.
    """
    model = (FAMILIES | MORE)[family](root / "model")
    for seed, name in enumerate(("one", "two")):
        save_teacher(model, root / name, seed)
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        pixels = rng.integers(0, 256, (PREPARED_SIZE, PREPARED_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        picture = "source_image" if family in EDITING and i % 2 else "target_image"
        prompt = f"a picture of {'cups ' * i}"
        rows.append({"id": str(i), "task": ("one", "two")[i % 2], "prompt": prompt, picture: f"{i}.png"})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        if family == "klein":  # 64 tokens, not 512: most of the time
            short = partial(Flux2KleinPipeline._get_qwen3_prompt_embeds, max_sequence_length=64)
            patch.setattr(Flux2KleinPipeline, "_get_qwen3_prompt_embeds", short)
        prepare(root / "rows.jsonl", model, root / "cache", resolution=PREPARED_SIZE)
    return root


# ------------------------------------------------------------------------------------------------ configurations


def config_of(root: Path, **changes) -> Config:
    """A run on a place's model, rows and LoRA files; changes are by their keys with dots."""
    raw = {
        "model": str(root / "model"),
        "student": {"lora": {"rank": 4}},
        "sources": {name: {"lora": [{"path": str(root / f"{name}.safetensors")}]} for name in ("one", "two")},
        "capabilities": {
            name: {"source": name, "task": "t2i", "data": {"prepared": str(root / "cache" / "rows.jsonl")}}
            for name in ("one", "two")
        },
        "rollout": {"num_inference_steps": 4},
        "training": {"output_dir": str(root / "run"), "batch_size": 4, "sample_every": 0},
    }
    return parse_config(raw, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def teachers_config(root: Path, output_dir: Path, guidance: float = 2.0, **changes) -> Config:
    """A run on a prepared place's two teachers, the second guided, that learns within 20 updates."""
    changes = {
        "sources.one.lora": [{"path": str(root / "one")}],
        "sources.two": {"lora": [{"path": str(root / "two")}], "guidance_scale": guidance},
        "training.output_dir": str(output_dir),
        "training.max_steps": 20,
        "training.batch_size": 8,
        "training.learning_rate": 2e-2,
        "training.warmup_steps": 1,
        "training.ema_decay": 0.5,
        "training.log_every": 1,
        **changes,
    }
    return config_of(root, **changes)


def losses(folder: Path) -> list[float]:
    """The losses of a run's log, update by update."""
    records = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]
