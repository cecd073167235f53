"""Builds the miniature's pipeline folder: FLUX.2 klein's own classes, small, with weights from the training."""

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from danceopd.miniature.looks import IMAGE_SIZE

TEXT_LENGTH = 16  # tokens of a prompt; the pipelines take it as max_sequence_length

READ_LAYERS = (9, 18, 27)  # whose outputs klein's pipeline hands to the transformer

TRANSFORMER = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": 3 * 96,
    "timestep_guidance_channels": 64,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}

TEXT_ENCODER = {
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": True,
}

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


# The space makes the first word the token that it is elsewhere.
_TEMPLATE = "<|im_start|>{% for m in messages %} {{ m.content }}{% endfor %}<|im_end|>"


def make_tokenizer(words: list[str], vocabulary: int = 768) -> Qwen2TokenizerFast:
    """Makes a byte-level tokenizer in which each of the words is one token; others fall apart into bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        [f" {word}" for word in sorted(set(words))],
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=list(_SPECIALS), initial_alphabet=alphabet, show_progress=False
        ),
    )
    model = json.loads(core.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"], merges=merges, additional_special_tokens=list(_SPECIALS[1:]), model_max_length=512
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def make_text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3ForCausalLM:
    """Makes a text encoder of three layers, and a fourth, whose output nobody reads, because a model normalises its
    last layer's."""
    return Qwen3ForCausalLM(Qwen3Config(**TEXT_ENCODER, num_hidden_layers=4, vocab_size=len(tokenizer)))


@torch.no_grad()
def deepened(encoder: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Returns a text encoder of 28 layers whose layers 9, 18 and 27 give what the first three gave.

    The layers between them add nothing: their output projections are zero.
    """
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers = READ_LAYERS[-1] + 1
    config.layer_types = None
    deep = Qwen3ForCausalLM(Qwen3Config(**{**config.to_dict(), "layer_types": None}))
    deep.model.embed_tokens.load_state_dict(encoder.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(encoder.model.norm.state_dict())
    starts = (0, *READ_LAYERS[:-1])
    for index, layer in enumerate(deep.model.layers):
        if index in starts:
            layer.load_state_dict(encoder.model.layers[starts.index(index)].state_dict())
        else:
            for p in layer.parameters():
                p.zero_() if p.ndim == 2 else p.fill_(1)
    return deep


def shallow(encoder: Qwen3ForCausalLM) -> nn.Module:
    """Returns the model of a deep encoder with only the layers that add something, and one more."""
    model = copy.deepcopy(encoder.model)
    model.layers = nn.ModuleList(model.layers[i] for i in (0, *READ_LAYERS))
    model.config.num_hidden_layers = len(model.layers)
    return model


def save(folder: Path, tokenizer, encoder: Qwen3ForCausalLM, vae: AutoencoderKLFlux2, transformer: nn.Module) -> Path:
    """Writes the pipeline folder in bfloat16; the encoder is the trained one of three layers."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = Flux2KleinPipeline(
        scheduler=scheduler, vae=vae, text_encoder=deepened(encoder), tokenizer=tokenizer, transformer=transformer
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    (folder / "miniature.json").write_text(json.dumps({"max_sequence_length": TEXT_LENGTH, "resolution": IMAGE_SIZE}))
    return folder
