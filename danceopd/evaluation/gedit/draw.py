"""Edits the pictures of GEdit-Bench with a pipeline."""

import hashlib
import inspect
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from danceopd.evaluation.gedit.benchmark import Benchmark, Row
from danceopd.models import loading
from danceopd.models.backbones import backbone_of, empty_transformer, pipeline_class_of
from danceopd.models.fingerprint import fingerprint
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of pictures; ours are PNGs

MADE_BY = "made_by.json"  # beside fullset: what drew the pictures of a method


@dataclass(frozen=True)
class Drawing:
    """How edits are drawn: the square root of a picture's pixels, and, where not None, other than the pipeline does."""

    resolution: int = 1024
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0


def picture_file(folder: Path, row: Row) -> Path:
    """Where a method's edit of a row is: the PNG, or a picture of another kind that some tool wrote."""
    place = folder / "fullset" / row.kind / row.language
    for suffix in SUFFIXES:
        if (place / (row.key + suffix)).is_file():
            return place / (row.key + suffix)
    return place / f"{row.key}.png"


def size_of(picture: Image.Image, resolution: int, multiple: int) -> tuple[int, int]:
    """(height, width) of an edit: the source's shape with about resolution^2 pixels, in multiples of `multiple`."""
    ratio = picture.width / picture.height
    width, height = resolution * math.sqrt(ratio), resolution / math.sqrt(ratio)
    return tuple(max(multiple, round(side / multiple) * multiple) for side in (height, width))


def seed_of(row: Row, seed: int) -> int:
    """The seed of a row's noise: of its place in the layout and a seed, whatever else is drawn, where or when."""
    place = f"{seed} {row.kind} {row.language} {row.key}"
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=6).digest(), "big")


def load_pipeline(
    model: Path,
    lora: Path | None = None,
    transformer: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
):
    """An editing pipeline of diffusers from its folder, with a LoRA's file or folder, or another transformer's folder.

    The LoRA may be in any layout that load_lora takes, and lies beside the weights, as the pipeline's own
    load_lora_weights puts it. Raises UserError for a folder that draws from text alone, and for what cannot be loaded.
    """
    from danceopd.models.lora_files import load_lora, save_lora

    backbone, pipeline_class = check_pipeline(model, lora, transformer)
    parts = {"transformer": backbone.load_transformer(transformer, dtype)} if transformer else {}
    pipeline = loading.load(pipeline_class, model, dtype=dtype, use_safetensors=True, **parts)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        with TemporaryDirectory() as folder:
            save_lora(load_lora(lora, pipeline.transformer, pipeline_class), Path(folder), pipeline_class)
            pipeline.load_lora_weights(folder, use_safetensors=True)
    return pipeline.to(device)


def check_pipeline(model: Path, lora: Path | None = None, transformer: Path | None = None):
    """(the family's module, the pipeline's class) of what load_pipeline would load, by files' headers and names alone.

    Raises UserError as it does.
    """
    from danceopd.models.lora_files import lora_parameters

    backbone = backbone_of(model)
    if "edit" not in backbone.tasks(model):
        name = loading.class_name_of(model)
        raise UserError(f"{model} is a {name}, which draws from text alone; give the folder of an editing pipeline")
    loading.check_weights(transformer or model)
    loading.check_weights(model / "vae")
    if lora:
        lora_parameters(lora, empty_transformer(transformer or model), pipeline_class_of(model))
    return backbone, pipeline_class_of(model)


def _identity(path: Path | None) -> str | None:
    """Names a file's or a folder's content, wherever it lies."""
    if path is None or path.is_dir():
        return path and fingerprint(path)
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def claim(
    folder: Path, model: Path, lora: Path | None, transformer: Path | None, drawing: Drawing, dtype: torch.dtype
) -> None:
    """Say in a method's folder what draws its pictures. Raises UserError where others were drawn there."""
    pictures = any(path.suffix in SUFFIXES for path in (folder / "fullset").glob("*/*/*"))
    what = {
        "model": _identity(loading.transformer_folder(model)),
        "lora": _identity(lora),
        "transformer": _identity(transformer and loading.transformer_folder(transformer)),
        "dtype": str(dtype).removeprefix("torch."),
        **asdict(drawing),
    }
    try:
        there = json.loads((folder / MADE_BY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = None
    except ValueError as error:
        raise UserError(f"{folder / MADE_BY} is damaged ({error}); remove {folder}, or give another --method") from None
    if pictures and there != what:
        other = [name for name in what if there is None or there.get(name) != what[name]]
        by = f"with other settings ({', '.join(other)})" if there else "by another tool"
        raise UserError(
            f"the pictures in {folder} were made {by}; give another --method, or score them without --model"
        )
    if there != what:
        write_atomic(folder / MADE_BY, (json.dumps(what, indent=1) + "\n").encode())


def edit(pipeline, picture: Image.Image, instruction: str, size: tuple[int, int], seed: int, drawing: Drawing):
    """One edit by an editing pipeline of diffusers: a picture of `size` (height, width).

    Raises UserError where numbers in it are not finite, which diffusers would draw as black.
    """
    height, width = size
    takes = inspect.signature(type(pipeline).__call__).parameters
    options: dict[str, Any] = {}
    if drawing.num_inference_steps is not None:
        options["num_inference_steps"] = drawing.num_inference_steps
    if "_auto_resize" in takes:  # Kontext, which else takes sizes of its own for the source, and of 1024^2 for the edit
        options |= {"_auto_resize": False, "max_area": height * width}
    if type(pipeline).__name__.startswith("QwenImage"):
        options["negative_prompt"] = " "  # without one there is no guidance
        if drawing.guidance_scale is not None:
            options["true_cfg_scale"] = drawing.guidance_scale
    elif drawing.guidance_scale is not None:
        options["guidance_scale"] = drawing.guidance_scale
    drawn = pipeline(
        image=picture.resize((width, height), Image.Resampling.LANCZOS),
        prompt=instruction,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **options,
    ).images
    if not np.isfinite(drawn).all():
        raise UserError(f"the model draws no finite numbers for {instruction!r}; try --dtype bfloat16 or more steps")
    return pipeline.image_processor.numpy_to_pil(drawn)[0]


def missing_rows(benchmark: Benchmark, folder: Path, rows: Iterable[Row] | None = None) -> list[Row]:
    """The rows whose edit a method's folder lacks."""
    return [row for row in (benchmark.rows if rows is None else rows) if not picture_file(folder, row).is_file()]


def edit_rows(benchmark: Benchmark, rows: Sequence[Row], folder: Path, pipeline, multiple: int, drawing: Drawing):
    """Draw the edits of rows into a method's folder, each file whole or not at all; what is there stays.

    One at a time: pictures are of different sizes, and what comes out must not depend on who is beside it.
    """
    for row in tqdm(missing_rows(benchmark, folder, rows), "edits", unit="picture"):
        source = benchmark.picture(row)
        size = size_of(source, drawing.resolution, multiple)
        buffer = io.BytesIO()
        edit(pipeline, source, row.instruction, size, seed_of(row, drawing.seed), drawing).save(buffer, "PNG")
        write_atomic(folder / "fullset" / row.kind / row.language / f"{row.key}.png", buffer.getvalue())
