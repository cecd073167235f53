"""Tiny Z-Image pipelines with random weights, saved as whole pipeline folders."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageOmniPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def save_tiny(folder: str | Path, seed: int = 0) -> Path:
    """A ZImagePipeline folder (text to image) in float32."""
    ZImagePipeline(**_components(seed, siglip_size=None)).save_pretrained(folder)
    return Path(folder)


def save_tiny_omni(folder: str | Path, seed: int = 0) -> Path:
    """A ZImageOmniPipeline folder (text to image and edit) in float32."""
    parts = _components(seed, siglip_size=16)
    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16
    )
    parts["siglip"] = _random(Siglip2VisionModel(config))
    parts["siglip_processor"] = Siglip2ImageProcessor(patch_size=16, max_num_patches=20)
    ZImageOmniPipeline(**parts).save_pretrained(folder)
    return Path(folder)


def _random(model):
    """Vectors (norms, biases) and pad tokens start at constants that could hide an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or len(parameter) == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def _components(seed, siglip_size):
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        siglip_feat_dim=siglip_size,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vocabulary = {token: i for i, token in enumerate(SPECIALS + sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=SPECIALS[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    text_config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
    )
    return {
        "transformer": _random(transformer),
        "vae": _random(vae),
        "text_encoder": _random(Qwen3Model(text_config)),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
    }
