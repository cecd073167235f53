"""A whole FLUX.1 or Kontext pipeline folder of the real classes, tiny and random."""

import json
import string
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

CHARACTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A token for each character, inside a word and at its end."""
    folder.mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(c + "</w>" for c in CHARACTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """A token for each character and for the beginning of a word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512)


def save_tiny(folder, seed: int = 0, pipeline: str = "FluxKontextPipeline", guidance_embeds: bool = True) -> Path:
    """Write the folder of `pipeline` (FluxPipeline or FluxKontextPipeline); guidance_embeds as in dev, not in schnell.

    Pictures' sides are multiples of 16; 4 latent channels.
    """
    folder = Path(folder)
    torch.manual_seed(seed)
    clip_words = clip_tokenizer(folder / "tokenizer")
    clip = CLIPTextConfig(
        vocab_size=len(clip_words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5_words = t5_tokenizer()
    t5 = T5Config(vocab_size=len(t5_words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    for name, parameter in transformer.named_parameters():
        if "attn.norm_" in name:
            parameter.data.mul_(2)  # sharper attention, such that a wrong position id shows among 512 text tokens
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    getattr(diffusers, pipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=clip_words,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_words,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder
