"""Trains the miniature's sources: LoRAs of its base, each for a capability of its own.

A LoRA that should draw or edit better gets nowhere in an hour of learning from pictures alone: the noise of the samples
hides what little a small network has left to learn. So all weights are tuned first. The LoRA starts as the best cut of
what that changed, and is fitted to the velocities of the tuned network, which have no noise. A look, as a background of
night, is learned from pictures in minutes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from danceopd.miniature import base
from danceopd.miniature.base import Batches, denoising
from danceopd.miniature.looks import LOOKS
from danceopd.miniature.pipeline import shallow
from danceopd.models.loading import load
from danceopd.models.lora_files import FILES, add_metadata
from danceopd.world.stages import run_stage

BATCH, DECAY = 64, 0.4


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        shares: The share of updates of each capability (miniature.latents.sample).
        shards: The number of shards of each.
        steps: Number of updates.
        seed: Of the samples' order and the noise.
        rank: Of the LoRA.
        tuned: The network of TUNED whose velocities the LoRA is fitted to; None where it learns from pictures.
        learning_rate: Of Muon for the LoRA; a look that is learned from pictures takes a larger one.
    """

    shares: dict[str, float]
    shards: dict[str, int]
    steps: int
    seed: int
    rank: int = 16
    tuned: str | None = None
    learning_rate: float = 2e-3


EDITS = ({"local": 0.65, "global": 0.35}, {"local": 7, "global": 5})
HALF_EDITS = ({"local-half": 0.65, "global-half": 0.35}, {"local-half": 7, "global-half": 4})

TUNED = {  # with all weights, for the LoRAs to be fitted to; they do not ship
    "t2i": Recipe({"t2i": 1.0}, {"t2i": 24}, 12_000, 31),
    "edit": Recipe(*EDITS, 6000, 32),
    "edit-half": Recipe(*HALF_EDITS, 2200, 33),
}

RECIPES = {
    "t2i": Recipe({"t2i": 1.0}, {"t2i": 24}, 6000, 21, 64, "t2i"),
    "edit": Recipe(*EDITS, 4000, 22, 64, "edit"),
    "local": Recipe({"local": 1.0}, {"local": 7}, 400, 23, 16, "edit"),
    "global": Recipe({"global": 1.0}, {"global": 5}, 300, 24, 16, "edit"),
    "edit-half": Recipe(*HALF_EDITS, 800, 25, 64, "edit-half"),
    **{
        look: Recipe({look: 1.0}, {look: 2}, 1200 if look == "sketch" else 600, 26 + number, 8, learning_rate=8e-3)
        for number, look in enumerate(LOOKS)
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
    teacher = None if recipe.tuned is None else tune(folder, pipeline, recipe.tuned)
    torch.manual_seed(recipe.seed)
    parts = load(Flux2KleinPipeline, pipeline, dtype=torch.float32)
    transformer = parts.transformer.requires_grad_(False)
    targets = [key for key, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    transformer.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=targets))
    if teacher is not None:
        _start_at(transformer, teacher, recipe.rank)
    average = _run(folder, name, parts, recipe, recipe.learning_rate, lambda key, _: True, teacher)
    layers = {key: value.to(torch.bfloat16) for key, value in get_peft_model_state_dict(average).items()}
    Flux2KleinPipeline.save_lora_weights(folder / name, transformer_lora_layers=layers)
    if name in LOOKS:
        add_metadata(folder / name / FILES[1], {"modelspec.trigger_phrase": name})
    return folder / name


@torch.no_grad()
def _start_at(adapted: nn.Module, tuned: nn.Module, rank: int) -> None:
    """Starts an adapter as the best cut of what tuning changed to its rank."""
    weights = dict(tuned.named_modules())
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer):
            change = weights[name].weight - layer.base_layer.weight
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            layer.lora_A["default"].weight.copy_(s[:rank, None].sqrt() * vh[:rank])
            layer.lora_B["default"].weight.copy_(u[:, :rank] * s[:rank].sqrt())


def tune(folder: Path, pipeline: Path, name: str) -> nn.Module:
    """Trains all weights of the base's transformer, going on from what the folder holds.

    Args:
        folder: Holds states and data.
        pipeline: The miniature's pipeline folder.
        name: One of TUNED.

    Returns:
        The tuned transformer.
    """
    recipe = TUNED[name]
    torch.manual_seed(recipe.seed)
    parts = load(Flux2KleinPipeline, pipeline, dtype=torch.float32)
    return _run(folder, f"{name}-tuned", parts, recipe, base.LEARNING_RATE, lambda key, _: "blocks." in key)


def _run(folder: Path, stage: str, parts, recipe: Recipe, learning_rate: float, matrices, teacher=None) -> nn.Module:
    batches = Batches(folder / "data", parts.vae, parts.tokenizer, recipe.shares, recipe.shards, BATCH, recipe.seed)
    text = shallow(parts.text_encoder).requires_grad_(False)
    loss_of = denoising(parts.transformer, text, teacher)

    def loss(step: int) -> torch.Tensor:
        return loss_of(*batches(step))

    return run_stage(
        folder,
        stage,
        parts.transformer,
        loss,
        steps=recipe.steps,
        learning_rate=learning_rate,
        decay=DECAY,
        matrices=matrices,
        products=torch.bfloat16,
    )
