"""Trains the miniature's sources: LoRAs of its base, each for a capability of its own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from danceopd.miniature.base import Batches, denoising
from danceopd.miniature.pipeline import shallow
from danceopd.models.backbones import flux2
from danceopd.models.loading import load
from danceopd.models.shared_base import target_layers
from danceopd.world.stages import run_stage

BATCH, LEARNING_RATE, DECAY = 64, 2e-3, 0.5


@dataclass(frozen=True)
class Recipe:
    """How one source is trained.

    Attributes:
        shares: The share of updates of each capability (miniature.latents.sample).
        shards: The number of shards of each.
        steps: Number of updates.
        seed: Of the samples' order and the noise.
        rank: Of the LoRA.
    """

    shares: dict[str, float]
    shards: dict[str, int]
    steps: int
    seed: int
    rank: int = 16


RECIPES = {
    "t2i": Recipe({"t2i": 1.0}, {"t2i": 16}, 16_000, 21, 32),
    "edit": Recipe({"local": 0.65, "global": 0.35}, {"local": 7, "global": 5}, 12_000, 22, 32),
    "local": Recipe({"local": 1.0}, {"local": 7}, 4000, 23),
    "global": Recipe({"global": 1.0}, {"global": 5}, 2000, 24),
    "edit-half": Recipe({"local-half": 0.65, "global-half": 0.35}, {"local-half": 7, "global-half": 4}, 12_000, 25, 32),
    **{
        style: Recipe({style: 1.0}, {style: 3}, 2000, 26 + number)
        for number, style in enumerate(("sketch", "mosaic", "silhouette", "neon"))
    },
}


def train(folder: Path, pipeline: Path, name: str) -> Path:
    """Trains a source, going on from what the folder holds.

    Args:
        folder: Holds states and data.
        pipeline: The miniature's pipeline folder.
        name: One of RECIPES.

    Returns:
        folder/NAME, with pytorch_lora_weights.safetensors in diffusers' layout.
    """
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    parts = load(Flux2KleinPipeline, pipeline, dtype=torch.float32)
    transformer, vae = parts.transformer.requires_grad_(False), parts.vae
    transformer.add_adapter(
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.rank,
            target_modules=target_layers(transformer, flux2.LORA_TARGETS),
        )
    )
    text = shallow(parts.text_encoder)
    batches = Batches(folder / "data", vae, parts.tokenizer, recipe.shares, recipe.shards, BATCH, recipe.seed)
    loss_of = denoising(transformer, text.requires_grad_(False))

    def loss(step: int) -> torch.Tensor:
        return loss_of(*batches(step))

    average = run_stage(
        folder,
        name,
        transformer,
        loss,
        steps=recipe.steps,
        learning_rate=LEARNING_RATE,
        decay=DECAY,
        matrices=lambda key, _: True,
        products=torch.bfloat16,
    )
    layers = {key: value.to(torch.bfloat16) for key, value in get_peft_model_state_dict(average).items()}
    Flux2KleinPipeline.save_lora_weights(folder / name, transformer_lora_layers=layers)
    return folder / name
