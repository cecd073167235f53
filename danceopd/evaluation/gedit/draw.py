"""Edits the pictures of GEdit-Bench with a pipeline."""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from danceopd.evaluation.gedit.benchmark import Benchmark, Row
from danceopd.evaluation.pipelines import call_options, drawn_by
from danceopd.models import loading
from danceopd.models.backbones import backbone_of, empty_transformer, family_of, pipeline_class_of
from danceopd.models.fingerprint import identity
from danceopd.models.lora_files import lora_parameters
from danceopd.support.bars import bar
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.texts import parse_object

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of pictures; ours are PNGs

MADE_BY = "made_by.json"  # beside fullset: what drew the pictures of a method


@dataclass(frozen=True)
class Editing:
    """How edits are drawn; None leaves a value to the pipeline.

    Attributes:
        resolution: The square root of a picture's number of pixels.
        num_inference_steps: Solver steps.
        guidance_scale: Of the pipeline's guidance.
        seed: Of the noise, with a row's place (seed_of).
        max_sequence_length: Tokens of a prompt, padding included.
    """

    resolution: int = 1024
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    max_sequence_length: int | None = None


def picture_file(folder: Path, row: Row) -> Path:
    """Returns where a method's edit of a row is or will be: the PNG, or a picture of another kind that is there."""
    place = folder / "fullset" / row.kind / row.language
    for suffix in SUFFIXES:
        if (place / (row.key + suffix)).is_file():
            return place / (row.key + suffix)
    return place / f"{row.key}.png"


def size_of(picture: Image.Image, resolution: int, multiple: int, family: ModuleType | None = None) -> tuple[int, int]:
    """Finds the size of an edit: its picture's shape, about resolution^2 pixels, and what the pipeline takes.

    Args:
        picture: The picture to edit.
        resolution: The square root of its number of pixels; more where a side would be too short for the pipeline.
        multiple: What both sides are multiples of.
        family: The backbone's module, whose SOURCE_LIMITS say what its pipelines take; nothing is refused without.

    Returns:
        (height, width).

    Raises:
        UserError: The picture's shape is too long for the pipeline.
    """
    least, longest = getattr(family, "SOURCE_LIMITS", (multiple, math.inf))
    ratio = picture.width / picture.height
    width, height = resolution * math.sqrt(ratio), resolution / math.sqrt(ratio)
    more = max(1.0, least / min(width, height))
    sides = [max(multiple, round(more * side / multiple) * multiple) for side in (height, width)]
    if max(sides) > longest * min(sides):
        raise UserError(
            f"a picture of {picture.width} x {picture.height} is too long to be edited: the pipeline takes up to "
            f"{longest} to 1; crop it"
        )
    return tuple(sides)


def seed_of(row: Row, seed: int) -> int:
    """Returns the seed of a row's noise, from its place in the layout: whatever else is drawn, where or when."""
    place = f"{seed} {row.kind} {row.language} {row.key}"
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=6).digest(), "big")


def check_pipeline(model: Path, lora: Path | None = None, transformer: Path | None = None) -> ModuleType:
    """Checks what load_pipeline would load, by files' headers and names alone.

    Returns:
        The module of the pipeline's family.

    Raises:
        UserError: The pipeline draws from text alone, or something could not be loaded.
    """
    backbone = backbone_of(model)
    if "edit" not in backbone.tasks(model):
        name = loading.class_name_of(model)
        raise UserError(f"{model} is a {name}, which draws from text alone; give the folder of an editing pipeline")
    loading.check_weights(transformer or model)
    loading.check_weights(model / "vae")
    if lora:
        lora_parameters(lora, empty_transformer(transformer or model), pipeline_class_of(model))
    return backbone


def claim(
    folder: Path, model: Path, lora: Path | None, transformer: Path | None, editing: Editing, dtype: torch.dtype
) -> None:
    """Notes in a method's folder what draws its pictures; a UserError where others were drawn there."""
    pictures = any(path.suffix in SUFFIXES for path in (folder / "fullset").glob("*/*/*"))
    what = {
        "model": identity(loading.transformer_folder(model)),
        "lora": lora and identity(lora),
        "transformer": transformer and identity(loading.transformer_folder(transformer)),
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(editing),
    }
    try:
        there = parse_object((folder / MADE_BY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = None
    except ValueError as error:
        raise UserError(f"{folder / MADE_BY} is damaged ({error}); remove {folder}, or give another --method") from None
    other = [name for name in what if there is None or there.get(name) != what[name]]
    if pictures and other:
        by = f"with other settings ({', '.join(other)})" if there else "by another tool"
        raise UserError(
            f"the pictures in {folder} were made {by}; give another --method, or score them without --model"
        )
    if there != what:
        write_atomic(folder / MADE_BY, (json.dumps(what, indent=1) + "\n").encode())


def edit(pipeline, picture: Image.Image, instruction: str, size: tuple[int, int], seed: int, editing: Editing):
    """Edits one picture with an editing pipeline of diffusers.

    Args:
        pipeline: As load_pipeline loads it.
        picture: The picture to edit, RGB.
        instruction: The prompt.
        size: (height, width) of the edit in pixels.
        seed: Of the noise, which is drawn on the CPU.
        editing: How it is drawn.

    Returns:
        The edit as a PIL picture.

    Raises:
        UserError: The pipeline refuses what it is given, or numbers in the edit are not finite, which diffusers would
            draw as black.
    """
    height, width = size
    options = call_options(
        pipeline, editing.guidance_scale, size, editing.num_inference_steps, editing.max_sequence_length
    )
    drawn = drawn_by(
        pipeline,
        image=picture.resize((width, height), Image.Resampling.LANCZOS),
        prompt=instruction,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    if not np.isfinite(drawn).all():
        raise UserError(f"the model draws no finite numbers for {instruction!r}; try --dtype bfloat16 or more steps")
    return pipeline.image_processor.numpy_to_pil(drawn)[0]


def missing_rows(benchmark: Benchmark, folder: Path, rows: Iterable[Row] | None = None) -> list[Row]:
    """Returns the rows whose edit a method's folder lacks."""
    return [row for row in (benchmark.rows if rows is None else rows) if not picture_file(folder, row).is_file()]


def edit_rows(benchmark: Benchmark, rows: Sequence[Row], folder: Path, pipeline, multiple: int, editing: Editing):
    """Draws the edits of rows into a method's folder, each file whole or not at all; what is there stays.

    One at a time: pictures are of different sizes, and what comes out must not depend on who is beside it.
    """
    for row in bar(missing_rows(benchmark, folder, rows), "edits", unit="picture"):
        source = benchmark.picture(row)
        size = size_of(source, editing.resolution, multiple, family_of(type(pipeline).__name__))
        buffer = io.BytesIO()
        edit(pipeline, source, row.instruction, size, seed_of(row, editing.seed), editing).save(buffer, "PNG")
        write_atomic(folder / "fullset" / row.kind / row.language / f"{row.key}.png", buffer.getvalue())
