"""A tiny random PRX pipeline folder of the real classes: no download, seconds on a CPU."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PRXPipeline,
    PRXTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5GemmaConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, padded on the left as Gemma's."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = {f"{token[1:-1]}_token": token for token in specials}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", model_max_length=256, **named)


def tiny_vae(deep: bool):
    if deep:
        return AutoencoderDC(
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.4,
        )
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.4,
        shift_factor=0.1,
    )


def save_tiny(folder, seed: int = 0, deep: bool = False) -> Path:
    """Save a whole pipeline folder. Sides are multiples of 16 pixels, with a deep-compression VAE of 8."""
    pytest.importorskip("ftfy")
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    module = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.2}
    config = T5GemmaConfig(encoder=module, decoder=module, vocab_size=len(tokenizer))
    pipeline = PRXPipeline(
        transformer=PRXTransformer2DModel(
            in_channels=4,
            context_in_dim=16,
            hidden_size=32,
            mlp_ratio=2.0,
            num_heads=2,
            depth=2,
            axes_dim=[8, 8],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=T5GemmaEncoder(config.encoder),
        tokenizer=tokenizer,
        vae=tiny_vae(deep),
        default_sample_size=256,
    )
    for parameter in pipeline.transformer.parameters():
        if parameter.dim() > 1 and not parameter.any():  # zeros as made: the last layer and the modulations
            parameter.data.normal_(0, 0.3)
    pipeline.save_pretrained(folder)
    config.save_pretrained(Path(folder) / "text_encoder")  # the released folder's is of encoder and decoder
    return Path(folder)
