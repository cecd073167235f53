"""A tiny random Krea 2 pipeline folder of the real classes: no download, seconds on a CPU."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from tiny_qwen3_vl import tiny_body
from tiny_qwen_image import tiny_tokenizer


def save_tiny(folder, seed: int = 0, distilled: bool = False) -> Path:
    """Save a whole pipeline folder. Sides are multiples of 16 pixels."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    for name, parameter in transformer.named_parameters():
        if "scale_shift_table" in name:  # zeros as made
            parameter.data.normal_(0, 0.3)
    pipeline = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[-0.5, 0.25, 0.1, -0.2],
            latents_std=[1.5, 0.8, 2.0, 1.2],
        ),
        text_encoder=tiny_body(tokenizer, layers=3),
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(1, 3),
        is_distilled=distilled,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
