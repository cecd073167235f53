"""Loads the diffusers pipelines that draw for a benchmark, with a LoRA or another transformer."""

import inspect
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from danceopd.models.backbones import backbone_of, family_of
from danceopd.models.loading import class_name_of, length_of_prompts, load, transformer_folder
from danceopd.models.lora_algebra import merge_into, named_factors
from danceopd.models.lora_files import load_lora, loads_loras
from danceopd.support.errors import UserError


def check_takes(model: Path, resolution: int | None, max_sequence_length: int | None) -> None:
    """Checks that a pipeline draws squares of a size, from prompts of a length.

    Args:
        model: The pipeline's folder; of a family that is not known nothing is checked.
        resolution: Sides in pixels; None for the pipeline's own.
        max_sequence_length: Tokens; None for the pipeline's own.

    Raises:
        UserError: It does not.
    """
    family = family_of(class_name_of(model))
    if family is None:
        return
    if resolution is not None:
        family.latent_shape(model, resolution, resolution)
    length_of_prompts(max_sequence_length, family, model)


def load_pipeline(
    model: Path,
    lora: Path | None = None,
    transformer: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
    weight: float = 1.0,
) -> DiffusionPipeline:
    """Loads a pipeline onto a device.

    Args:
        model: The pipeline's folder.
        lora: A LoRA's file or folder in any layout that models.lora_files.load_lora reads; it lies beside the weights,
            or is added to them where the pipeline loads no LoRAs.
        transformer: A folder whose transformer takes the place of the pipeline's own.
        device: Where it draws.
        dtype: Of all weights.
        offload: Whether the pipeline's parts wait in host memory, so that one at a time is on the card.
        weight: What the LoRA's change of the weights is multiplied by.

    Raises:
        UserError: The folder is no pipeline, or weights are missing or do not fit.
    """
    if not (Path(model) / "model_index.json").is_file() and (Path(model) / "modular_model_index.json").is_file():
        raise UserError(f"{model} is a {class_name_of(model)} of blocks, which is trained here but not evaluated yet")
    part = transformer_folder(model).name
    parts = {part: backbone_of(model).load_transformer(transformer, dtype)} if transformer else {}
    pipeline = load(DiffusionPipeline, model, dtype=dtype, use_safetensors=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        network = getattr(pipeline, part)
        factors = {n: (a, b, weight * s) for n, (a, b, s) in load_lora(lora, network, type(pipeline)).items()}
        if loads_loras(type(pipeline)):
            pipeline.load_lora_weights(named_factors(factors, f"{part}."))
        else:
            merge_into(network, factors)
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
        return pipeline
    return pipeline.to(device)


def call_options(
    pipeline: DiffusionPipeline,
    guidance_scale: float | None,
    size: tuple[int, int] | None,
    num_inference_steps: int | None,
    max_sequence_length: int | None,
) -> dict:
    """Collects the arguments of a pipeline's call; what is None is left to the pipeline.

    Args:
        pipeline: The pipeline.
        guidance_scale: As its family counts it.
        size: (height, width) in pixels.
        num_inference_steps: Steps.
        max_sequence_length: Tokens of a prompt.

    Returns:
        The arguments by name.

    Raises:
        UserError: The pipeline has no number of tokens to set.
    """
    family = family_of(type(pipeline).__name__)
    own = getattr(family, "call_options", _call_options)
    options = own(type(pipeline).__name__, guidance_scale, size)
    if num_inference_steps is not None:
        options["num_inference_steps"] = num_inference_steps
    if max_sequence_length is not None:
        argument = getattr(family, "LENGTH_ARGUMENT", "max_sequence_length")
        if not takes(pipeline, argument):
            raise UserError(f"a {type(pipeline).__name__} takes no max_sequence_length; leave it out")
        options[argument] = max_sequence_length
    return options


def _call_options(name: str, guidance_scale: float | None, size: tuple[int, int] | None) -> dict:
    """Returns the arguments as most pipelines call them."""
    options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    return options if size is None else options | {"height": size[0], "width": size[1]}


def drawn_by(pipeline: DiffusionPipeline, **options) -> np.ndarray:
    """Calls a pipeline for pictures [B, H, W, 3] in [0, 1]; a UserError for what its own check of them refuses."""
    try:
        return pipeline(output_type="np", **options).images
    except UserError:
        raise
    except ValueError as error:  # as diffusers' checks of sizes, guidance and lengths say it
        said = " ".join(str(error).split())
        raise UserError(f"{type(pipeline).__name__} refuses what it is asked for: {said}") from error


def takes(pipeline: DiffusionPipeline, argument: str) -> bool:
    """Returns whether a pipeline's call has an argument of this name."""
    return argument in inspect.signature(type(pipeline).__call__).parameters
