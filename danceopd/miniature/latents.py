"""Draws the training data of the miniature's networks: latents of pictures and tokens of prompts, kept in files."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file, save_file
from torch import nn

from danceopd.miniature import edits, looks, prompts
from danceopd.miniature.data import CAPABILITIES, sample
from danceopd.miniature.looks import CLASSES, LETTERS, STYLES
from danceopd.miniature.pipeline import TEXT_LENGTH
from danceopd.miniature.scene import render
from danceopd.world.prompts import NUMBERS, RELATIONS
from danceopd.world.stages import generator_of

SHARD = 4096  # samples of one file

SEED = 12_000  # of the first capability's

PART = 64  # pictures that the VAE takes at once

EMPTY_PROMPT_SHARE = 0.1


def words() -> list[str]:
    """Returns every word that a prompt of this world can hold."""
    texts = [
        *CLASSES,
        *map(prompts.plural, CLASSES),
        *LETTERS,
        *looks.PAINTS,
        *looks.BACKGROUNDS,
        *looks.TONES,
        *STYLES,
    ]
    texts += [*NUMBERS.values(), *RELATIONS, prompts.LEAD, *edits.SIDES, "an apple and a neon sign"]
    texts += ["add remove the replace with make out of move to change letter background give picture tone turn it into"]
    return [word for text in texts for word in text.split()]


def tokens_of(tokenizer, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Returns input_ids and attention_mask of prompts, [B, 16] int64, as klein's pipeline makes them."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for prompt in prompts
    ]
    options = {"padding": "max_length", "truncation": True, "max_length": TEXT_LENGTH, "return_tensors": "pt"}
    return dict(tokenizer(texts, **options))


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """Returns normalised latents [B, 64, 4, 4] of pictures [B, 3, 64, 64]."""
    parts = []
    for part in pictures.split(PART):
        part = part.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(nn.functional.pixel_unshuffle(vae.encode(part).latent_dist.mean.float(), 2))
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return (torch.cat(parts) - mean) / std


def shard(folder: Path, vae: AutoencoderKLFlux2, tokenizer, capability: str, index: int) -> dict:
    """Returns one shard of a capability's samples, the same for all networks, from its file if that is there.

    Returns:
        latents [4096, 64, 4, 4] float16, input_ids and attention_mask [4096, 16] int64, and for edits sources, shaped
        as latents.
    """
    path = folder / f"{capability}-{index:03d}.safetensors"
    if not path.exists():
        generator = generator_of(SEED + CAPABILITIES.index(capability), index)
        prompts, before, after = sample(capability, SHARD, generator)
        for i in (torch.rand(SHARD, generator=generator) < EMPTY_PROMPT_SHARE).nonzero()[:, 0].tolist():
            prompts[i] = ""
        tensors = {"latents": encode(vae, render(after)).half().contiguous(), **tokens_of(tokenizer, prompts)}
        if before is not None:
            tensors["sources"] = encode(vae, render(before)).half().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return load_file(path)
