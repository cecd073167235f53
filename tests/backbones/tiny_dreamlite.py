"""A tiny random DreamLite pipeline folder of the real classes: no download, seconds on a CPU."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DreamLitePipeline, DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler
from tiny_qwen3_vl import tiny_processor, tiny_reader
from tiny_qwen_image import tiny_tokenizer


def save_tiny(folder, seed: int = 0) -> Path:
    """Save a whole pipeline folder. Sides are multiples of 32 pixels."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipeline = DreamLitePipeline(
        text_encoder=tiny_reader(tokenizer),
        tokenizer=tokenizer,
        processor=tiny_processor(tokenizer),
        vae=AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        ),
        unet=DreamLiteUNetModel(
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj_rms",
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
            use_linear_projection=True,
            ff_mult=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.16),
    )
    pipeline.save_pretrained(folder)
    return Path(folder)
