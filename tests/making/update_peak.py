"""The most memory that an update takes on the CPU, by the allocator's own record, and models large enough to ask it."""

import contextlib
import gc
import shutil
from pathlib import Path

import torch
from model_runs import FAMILIES, MORE, write_lora, write_rows
from torch.profiler import ProfilerActivity, profile

from danceopd.api import builder_of
from danceopd.config.sections import Config
from danceopd.models.backbones import backbone_of
from danceopd.models.loading import transformer_folder
from danceopd.models.shared_base import target_layers
from danceopd.training.loop import Trainer


def storages() -> dict[int, int]:
    """Bytes of every storage that a tensor of this process lies in, by where it begins."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            with contextlib.suppress(RuntimeError):  # of a tensor without memory that another test left
                found[storage.data_ptr()] = storage.nbytes()
    return found


def update_peak(config: Config, updates: int = 2) -> int:
    """Bytes that a run holds at most in its first updates: what it was built of, and what the allocator gave since.

    The second update begins with the optimizer's states.
    """
    gc.collect()
    others = storages()
    trainer = Trainer(config, builder_of(config)(config))
    gc.collect()
    built = sum(size for place, size in storages().items() if place not in others)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(updates):
            trainer.update()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > built / 100, "the profiler saw no allocations"
    return built + most


def wide(family: str, heads: int, layers: int) -> dict:
    """What of a tiny transformer's configuration makes it so wide, by heads of 16, and so deep."""
    width, many = 16 * heads, {"num_layers": layers, "num_attention_heads": heads}
    if family == "sd3":
        return many | {"attention_head_dim": 16, "caption_projection_dim": width, "pos_embed_max_size": 24}
    if family in ("z", "z_omni"):
        return {"dim": width, "n_layers": layers, "n_heads": heads, "n_kv_heads": heads}
    if family == "krea2":
        return many | {"num_key_value_heads": heads // 2, "intermediate_size": 4 * width}
    if family == "prx":
        return {"hidden_size": width, "num_heads": heads, "depth": layers, "mlp_ratio": 4.0}
    if family == "dreamlite":
        return {"block_out_channels": (8 * heads, width, width), "layers_per_block": layers // 2}
    return many if family.startswith("qwen") else many | {"num_single_layers": layers}


def wide_place(root: Path, family: str, heads: int, layers: int, size: int, length: int, task: str = "t2i") -> Path:
    """Writes a wider model of a tiny family, two LoRAs of rank 8, and rows of random encodings of two capabilities."""
    model = (FAMILIES | MORE)[family](root / "model")
    backbone = backbone_of(model)
    tiny, folder = backbone.load_transformer(model), transformer_folder(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = type(tiny).from_config({**tiny.config, **wide(family, heads, layers)})
        shutil.rmtree(folder)
        transformer.save_pretrained(folder)
        adapted = target_layers(transformer, backbone.LORA_TARGETS, every=False)
        for name in ("one", "two"):
            write_lora(root / f"{name}.safetensors", transformer, adapted, 8)
        shape = backbone.latent_shape(model, size, size)
        write_rows(root / "cache", family, transformer, shape, {"one": task, "two": task}, size, length)
    return root
