"""The networks that benchmarks ask: the picture world's, a small SD3 of the real class, SD3.5-medium's size."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from danceopd.core.conditioning import Conditioning, Tensors
from danceopd.core.fields import Field
from danceopd.models.lora_algebra import Lora
from danceopd.models.shared_base import target_layers
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.files import SHIPPED, load_model

MODELS = ("world", "sd3", "sd35-medium")
RESOLUTIONS = {"world": 32, "sd3": 128, "sd35-medium": 1024}  # pixels, if none are asked for
SD3_TEXT = 333  # tokens: 77 of the CLIPs and 256 of T5


@dataclass(frozen=True)
class Network:
    """module: the network; field(module): it, or a copy of it, as a field; prompt(n): random ones of n samples."""

    module: nn.Module
    field: Callable[[nn.Module], Field]
    shape: tuple[int, ...]
    prompt: Callable[[int], Tensors]
    dtype: str

    def conditioning(self, samples: int, guidance_scale: float | None = None) -> Conditioning:
        scale = None if guidance_scale is None else torch.full((samples,), guidance_scale)
        made = Conditioning(self.prompt(samples), None, torch.zeros(samples, dtype=torch.bool), scale)
        return made.to(next(self.module.parameters()).device)


def load(model: str, resolution: int, device: torch.device) -> Network:
    """One of MODELS, frozen: float32 on the CPU and bf16 on a GPU; weights are random but those of the world's base."""
    torch.manual_seed(0)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    made = _world(resolution) if model == "world" else _sd3(model, resolution, device, getattr(torch, dtype))
    module = made[0].to(device, getattr(torch, dtype)).requires_grad_(False).eval()
    return Network(module, *made[1:], dtype)


def _world(resolution: int):
    network = load_model(SHIPPED / "base.safetensors")
    config = network.config
    if resolution != config.image_size:
        config = DiTConfig(**config.to_dict() | {"image_size": resolution})
        network = DiT(config)
        for parameter in network.parameters():
            if not parameter.any():  # it begins as zero
                nn.init.normal_(parameter, std=0.02)

    def prompt(n):
        return torch.randint(1, config.vocab_size, (n, config.text_length))

    return network, lambda module: module, (3, resolution, resolution), prompt


def small_sd3(side: int, width: int = 192, layers: int = 8, heads: int = 4, text: int = 256, pooled: int = 192):
    """An SD3Transformer2DModel with SD3.5-medium's parts; the same weights after the same torch.manual_seed."""
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=side // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=layers,
        attention_head_dim=width // heads, num_attention_heads=heads, caption_projection_dim=width,
        joint_attention_dim=text, pooled_projection_dim=pooled, pos_embed_max_size=side // 16,
        dual_attention_layers=tuple(range(layers // 2)), qk_norm="rms_norm",
    )  # fmt: skip
    nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return transformer


def _sd3(model: str, resolution: int, device: torch.device, dtype: torch.dtype):
    from diffusers import SD3Transformer2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of casts that are meant

    from danceopd.models.backbones import sd3

    if model == "sd3":
        transformer = small_sd3(resolution)
    else:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                transformer = SD3Transformer2DModel(**released().MODELS["sd3.5-medium"][1])
        finally:
            torch.set_default_dtype(default)
    config = transformer.config

    def prompt(n):
        return {
            "prompt_embeds": torch.randn(n, SD3_TEXT, config.joint_attention_dim).to(dtype),
            "pooled_prompt_embeds": torch.randn(n, config.pooled_projection_dim).to(dtype),
        }

    def field(module):
        return lambda latents, sigma, conditioning: sd3.velocity(module, latents, sigma, conditioning.prompt)

    return transformer, field, (16, resolution // 8, resolution // 8), prompt


def random_lora(transformer: nn.Module, rank: int, seed: int) -> Lora:
    """A LoRA on the layers that SD3's have, which moves the velocity."""
    from danceopd.models.backbones import sd3

    generator, lora = torch.Generator().manual_seed(seed), {}
    for name in target_layers(transformer, sd3.LORA_TARGETS):
        out, width = transformer.get_submodule(name).weight.shape
        a = torch.randn(rank, width, generator=generator) / width**0.5
        lora[name] = (a, 0.1 * torch.randn(out, rank, generator=generator), 1.0)
    return lora


def released() -> ModuleType:
    """The sizes of the released transformers, which the tests have too: tests/backbones/released.py."""
    return _of_tests("released")


def real_models() -> ModuleType:
    """What makes folders of models at their real sizes, without weights: tests/making/real_models.py."""
    return _of_tests("real_models")


def _of_tests(name: str) -> ModuleType:
    tests = Path(__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests / folder) for folder in ("backbones", "making") if str(tests / folder) not in sys.path]
    return import_module(name)
