"""Tiny transformers of every family and random LoRAs for them."""

from copy import deepcopy

import diffusers
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from danceopd.core.conditioning import Conditioning
from danceopd.models.backbones import sd3
from danceopd.models.shared_base import target_layers

SD3 = diffusers.StableDiffusion3Pipeline


HEADS = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}


TINY = {
    "sd3": (SD3, lambda: small_sd3()),
    "flux": (
        diffusers.FluxPipeline,
        lambda: diffusers.FluxTransformer2DModel(
            **HEADS, num_single_layers=2, in_channels=4, joint_attention_dim=12, pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4), guidance_embeds=True,
        ),
    ),
    "flux2": (
        diffusers.Flux2Pipeline,
        lambda: diffusers.Flux2Transformer2DModel(
            **HEADS, num_single_layers=2, in_channels=4, joint_attention_dim=12, timestep_guidance_channels=8,
            axes_dims_rope=(2, 2, 2, 2),
        ),
    ),
    "qwen": (
        diffusers.QwenImagePipeline,
        lambda: diffusers.QwenImageTransformer2DModel(
            **HEADS, in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 2, 2)
        ),
    ),
    "z": (
        diffusers.ZImagePipeline,
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 2, 2], axes_lens=[64, 16, 16],
        ),
    ),
}  # fmt: skip


def small_sd3(width=16, layers=2, **changes):
    torch.manual_seed(0)
    sizes = {"attention_head_dim": width // 2, "num_attention_heads": 2, "caption_projection_dim": width}
    shapes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 12}
    rest = {"pooled_projection_dim": 8, "pos_embed_max_size": 16, "dual_attention_layers": (0,), "num_layers": layers}
    return diffusers.SD3Transformer2DModel(**sizes | shapes | rest | changes).eval()


def linears(transformer, ends):
    return {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and n.endswith(ends)}


def random_lora(transformer, ends, rank, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    for name, linear in linears(transformer, ends).items():
        a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        lora[name] = (a, torch.randn(linear.out_features, rank, generator=generator) * 0.2, scale)
    return lora


def far_lora(transformer, seed, rank=2, targets=sd3.LORA_TARGETS):
    """An adapter of the layers that end in the targets, far from the base."""
    generator, lora = torch.Generator().manual_seed(seed), {}
    for name in target_layers(transformer, targets):
        out, width = transformer.get_submodule(name).weight.shape
        a = torch.randn(rank, width, generator=generator) / width**0.5
        lora[name] = (a, 2 * torch.randn(out, rank, generator=generator), 1.0)
    return lora


def prompts(n, length=5, wide=12, pooled=8):
    generator = torch.Generator().manual_seed(5)
    prompt = {
        "prompt_embeds": torch.randn(n, length, wide, generator=generator),
        "pooled_prompt_embeds": torch.randn(n, pooled, generator=generator),
    }
    return Conditioning(prompt, None, torch.zeros(n, dtype=torch.bool))


def batch(n, size=8):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 4, size, size, generator=generator), torch.linspace(0.1, 1, n)


def close(got, expected, tolerance=1e-5):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def diffusers_deltas(transformer, path, pipeline_class):
    """scale B A by module as diffusers loads the file into the transformer, without load_lora's help."""
    alphas = {"return_alphas": True} if pipeline_class is diffusers.FluxPipeline else {}
    state, *rest = pipeline_class.lora_state_dict(str(path), use_safetensors=True, return_lora_metadata=True, **alphas)
    metadata, network = rest[-1], rest[0] if alphas else None
    model = deepcopy(transformer)
    model.load_lora_adapter(state, network_alphas=network, metadata=metadata, prefix="transformer", adapter_name="x")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name: layer.get_delta_weight("x") for name, layer in layers.items()}
