"""Tiny random LongCat-Image pipeline folders of the real classes: no download, seconds on a CPU."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as editing
from tiny_qwen_image import tiny_processor, tiny_text_encoder, tiny_tokenizer

SMALLER = 256  # times: the editing pipeline takes pictures of 1024 x 1024 pixels, whatever it is given

_dimensions = editing.calculate_dimensions
editing.calculate_dimensions = lambda area, ratio: _dimensions(area / SMALLER, ratio)


def save_tiny(folder, seed: int = 0, edit: bool = False) -> Path:
    """Save a whole pipeline folder: LongCatImagePipeline, or LongCatImageEditPipeline if `edit`.

    Sides are multiples of 16 pixels; the pipelines take 16 latent channels for granted.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipeline = (LongCatImageEditPipeline if edit else LongCatImagePipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            norm_num_groups=4,
            layers_per_block=1,
            scaling_factor=0.4,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_processor=tiny_processor(tokenizer),
        transformer=LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
