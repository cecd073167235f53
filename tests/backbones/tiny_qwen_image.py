"""Tiny random Qwen-Image pipeline folders of the real classes: no download, seconds on a CPU."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.utils import is_torchvision_available

if not is_torchvision_available():
    # transformers wants torchvision for the part of this processor that reads films, and loads none of it without.
    # No picture needs that part: where torchvision is missing, the tests go without it.
    Qwen2VLProcessor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE without merges: one token a byte, and Qwen's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*letters, *SPECIAL])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=list(SPECIAL[1:]))


def tiny_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL of width 16, two layers each for text and pictures."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,  # at the default of 0.02 so small a network hardly mixes its tokens
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [1, 1, 2]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "initializer_range": 0.2,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def tiny_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """What shows pictures to the text encoder."""
    readers = {"image_processor": Qwen2VLImageProcessor(), "tokenizer": tokenizer}
    if is_torchvision_available():
        readers["video_processor"] = Qwen2VLVideoProcessor()
    return Qwen2VLProcessor(**readers)


def save_tiny(folder, seed: int = 0, edit: bool = False) -> Path:
    """Save a whole pipeline folder: QwenImagePipeline, or QwenImageEditPlusPipeline if `edit`.

    Sides are multiples of 16 pixels. The editing transformer has zero_cond_t (as Qwen-Image-Edit-2511 has):
    the references' tokens see timestep 0.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    parts = {
        "transformer": QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            zero_cond_t=edit,
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[-0.5, 0.25, 0.1, -0.2],
            latents_std=[1.5, 0.8, 2.0, 1.2],
        ),
        # The released scheduler's configuration.
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        "text_encoder": tiny_text_encoder(tokenizer),
        "tokenizer": tokenizer,
    }
    if edit:
        parts["processor"] = tiny_processor(tokenizer)
    pipeline = (QwenImageEditPlusPipeline if edit else QwenImagePipeline)(**parts)
    pipeline.save_pretrained(folder)
    return Path(folder)
