"""A tiny random Qwen-Image-2.1 pipeline folder of the real classes: no download, seconds on a CPU."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from tiny_qwen3_vl import tiny_processor, tiny_reader
from tiny_qwen_image import tiny_tokenizer


def save_tiny(folder, seed: int = 0) -> Path:
    """Save a whole pipeline folder. Sides are multiples of 32 pixels."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
        ),
        vae=AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 2, 2],
            num_res_blocks=1,
            latents_mean=[-0.5, 0.25, 0.1, -0.2],
            latents_std=[1.5, 0.8, 2.0, 1.2],
        ),
        text_encoder=tiny_reader(tokenizer),
        processor=tiny_processor(tokenizer),
        transformer=QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
