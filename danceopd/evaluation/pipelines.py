"""Loads the diffusers pipelines that draw for a benchmark, with a LoRA or another transformer."""

import inspect
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from danceopd.models.backbones import backbone_of
from danceopd.models.loading import load
from danceopd.models.lora_algebra import named_factors
from danceopd.models.lora_files import load_lora
from danceopd.support.errors import UserError


def load_pipeline(
    model: Path,
    lora: Path | None = None,
    transformer: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> DiffusionPipeline:
    """Loads a pipeline onto a device.

    Args:
        model: The pipeline's folder.
        lora: A LoRA's file or folder in any layout that models.lora_files.load_lora reads; it lies beside the weights.
        transformer: A folder whose transformer takes the place of the pipeline's own.
        device: Where it draws.
        dtype: Of all weights.
        offload: Whether the pipeline's parts wait in host memory, so that one at a time is on the card.

    Raises:
        UserError: The folder is no pipeline, or weights are missing or do not fit.
    """
    parts = {"transformer": backbone_of(model).load_transformer(transformer, dtype)} if transformer else {}
    pipeline = load(DiffusionPipeline, model, dtype=dtype, use_safetensors=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        part = "transformer" if hasattr(pipeline, "transformer") else "unet"
        factors = named_factors(load_lora(lora, getattr(pipeline, part), type(pipeline)), f"{part}.")
        pipeline.load_lora_weights(factors)
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def guidance_options(pipeline: DiffusionPipeline, guidance_scale: float | None) -> dict:
    """Returns the arguments that guide a pipeline's call at a scale, or as it does by itself where that is None."""
    if type(pipeline).__name__.startswith("QwenImage"):  # whose guidance needs a negative prompt, else there is none
        scale = {} if guidance_scale is None else {"true_cfg_scale": guidance_scale}
        return {**scale, "negative_prompt": " "} if guidance_scale is None or guidance_scale > 1 else scale
    return {} if guidance_scale is None else {"guidance_scale": guidance_scale}


def prompt_options(pipeline: DiffusionPipeline, max_sequence_length: int | None) -> dict:
    """Returns the argument that sets the tokens of a prompt, none where that is None.

    Raises UserError where the pipeline has no such argument.
    """
    if max_sequence_length is None:
        return {}
    if not takes(pipeline, "max_sequence_length"):
        raise UserError(f"a {type(pipeline).__name__} takes no max_sequence_length; leave it out")
    return {"max_sequence_length": max_sequence_length}


def takes(pipeline: DiffusionPipeline, argument: str) -> bool:
    """Returns whether a pipeline's call has an argument of this name."""
    return argument in inspect.signature(type(pipeline).__call__).parameters
