"""A tiny random Stable Diffusion 3.5 pipeline folder of the real classes: 8 pixels per latent, sides up to 128."""

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CHARACTERS = string.digits + string.ascii_letters + string.punctuation


def save_tiny(folder: Path, seed: int = 0, **transformer) -> Path:
    """Save the pipeline into folder and return it; keywords change the transformer's config (SD3.5-medium's kind)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(**transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_clip(width=16, pooled=12),
            tokenizer=_clip_tokenizer(folder),
            text_encoder_2=_clip(width=16, pooled=20),
            tokenizer_2=_clip_tokenizer(folder, pad_token="!"),  # the real ones differ in this too
            text_encoder_3=_t5(),
            tokenizer_3=_t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def _transformer(**changes) -> SD3Transformer2DModel:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 40,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return SD3Transformer2DModel(**config | changes)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip_vocabulary() -> list[str]:
    letters = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    return [*letters, "<|startoftext|>", "<|endoftext|>"]


def _clip_tokenizer(folder: Path, **options) -> CLIPTokenizer:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: i for i, token in enumerate(_clip_vocabulary())}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77, **options)
    vocabulary.unlink()
    merges.unlink()
    return tokenizer


def _clip(width: int, pooled: int) -> CLIPTextModelWithProjection:
    size = len(_clip_vocabulary())
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=pooled,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        initializer_factor=3.0,  # tokens far enough apart that the prompt matters
    )
    return CLIPTextModelWithProjection(config).eval()


def _t5_tokenizer() -> T5TokenizerFast:
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram([*((t, 0.0) for t in specials), *((c, -1.0) for c in "▁" + CHARACTERS)], 2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=128,
        d_model=40,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()
