"""Draws GenEval's prompts with a diffusers pipeline, into the benchmark's layout."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from danceopd.evaluation.geneval.layout import prompt_folder
from danceopd.evaluation.pipelines import call_options, check_takes, load_pipeline
from danceopd.models.backbones import family_of
from danceopd.models.fingerprint import identity
from danceopd.models.loading import class_name_of
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.ranks import ALONE, Ranks, agreed
from danceopd.support.texts import parse_json

MARK = "generation.json"  # what drew a folder's pictures


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; None leaves a value to the pipeline.

    Attributes:
        model, transformer, lora, device, dtype, offload: As for evaluation.pipelines.load_pipeline.
        samples: Pictures of a prompt.
        seed: Of the noise, with a picture's place (sample_seed).
        num_inference_steps: Solver steps.
        guidance_scale: Of the pipeline's guidance.
        resolution: Both sides of a picture in pixels.
        batch_size: Pictures at a time.
        max_sequence_length: Tokens of a prompt, padding included.
    """

    model: Path
    transformer: Path | None = None
    lora: Path | None = None
    samples: int = 4
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    resolution: int | None = None
    batch_size: int = 4
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    offload: bool = False
    max_sequence_length: int | None = None


def sample_seed(seed: int, index: int, sample: int) -> int:
    """Returns the seed of a picture's noise, from the place of its prompt and its number among the prompt's samples."""
    return int.from_bytes(hashlib.blake2b(repr((seed, index, sample)).encode(), digest_size=7).digest(), "little")


def draw_pictures(
    metadata: list[dict], folder: Path, how: Drawing, ranks: Ranks = ALONE, progress: Callable = lambda items: items
) -> int:
    """Draws what is not there yet of this rank's prompts, which are every ranks.size-th.

    Each picture is written atomically, so that after a kill the same call goes on.

    Args:
        metadata: The benchmark's prompts, a line each.
        folder: Where the pictures are or will be.
        how: What draws them, and how.
        ranks: The processes that share the prompts; every one calls this.
        progress: Wraps the list of what is left (tqdm fits).

    Returns:
        The number of pictures drawn by this rank.

    Raises:
        UserError: Something else drew the folder's pictures, or the model or LoRA cannot be loaded.
    """
    agreed(ranks, check_draws_text, how.model)
    agreed(ranks, check_takes, how.model, how.resolution, how.max_sequence_length)
    agreed(ranks, check_mark, metadata, folder, how)
    mine = range(ranks.rank, len(metadata), ranks.size)
    left = []
    for index in mine:
        missing = [k for k in range(how.samples) if not _picture(folder, index, k).exists()]
        left += [(index, missing[i : i + how.batch_size]) for i in range(0, len(missing), how.batch_size)]
    draw = agreed(ranks, lambda: load_drawer(how) if left else None)  # before anything is written
    data = (json.dumps(mark(how), indent=1) + "\n").encode()
    agreed(ranks, lambda: ranks.rank or write_atomic(folder / MARK, data))  # before any picture is
    for index in mine:
        line = prompt_folder(folder, index) / "metadata.jsonl"
        if not line.exists():
            write_atomic(line, (json.dumps(metadata[index]) + "\n").encode())
    for index, numbers in progress(left):
        seeds = [sample_seed(how.seed, index, k) for k in numbers]
        for number, image in zip(numbers, draw(metadata[index]["prompt"], seeds), strict=True):
            png = io.BytesIO()
            image.save(png, "PNG")
            write_atomic(_picture(folder, index, number), png.getvalue())
    return sum(len(numbers) for _, numbers in left)


def _picture(folder: Path, index: int, number: int) -> Path:
    return prompt_folder(folder, index) / "samples" / f"{number:04d}.png"


def mark(how: Drawing) -> dict:
    """Returns all that a picture depends on, apart from its prompt and number; moving a model changes nothing."""
    networks = {name: getattr(how, name) for name in ("model", "transformer", "lora")}
    return {
        **{name: path and identity(path) for name, path in networks.items()},
        "seed": how.seed,
        "num_inference_steps": how.num_inference_steps,
        "guidance_scale": how.guidance_scale,
        "resolution": how.resolution,
        "max_sequence_length": how.max_sequence_length,
        "dtype": str(how.dtype).removeprefix("torch."),
    }


def check_mark(metadata: list[dict], folder: Path, how: Drawing) -> None:
    """Checks that a folder's pictures are of these prompts, drawn in this way.

    Raises:
        UserError: It holds other prompts' pictures, another model's, or another tool's.
    """
    there = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()) if folder.is_dir() else []
    for place in there:
        index, line = int(place.name), place / "metadata.jsonl"
        if not line.exists():
            continue
        try:
            same = index < len(metadata) and parse_json(line.read_bytes()) == metadata[index]
        except ValueError:
            same = False
        if not same:
            raise UserError(
                f"{line} is not line {index + 1} of the metadata; remove the file if it is torn, or draw into another "
                "folder"
            )
    path, now = folder / MARK, mark(how)
    if not path.exists():
        if any((place / "samples").is_dir() for place in there):
            raise UserError(f"{folder} holds pictures that another tool drew; leave out --model to score them")
        return
    try:
        before = parse_json(path.read_bytes())
        changed = [key for key in now if before.get(key) != now[key]]
    except (ValueError, AttributeError):
        raise UserError(f"{path} is damaged; draw into another folder") from None
    if changed:
        raise UserError(f"{folder} holds pictures drawn with another {', '.join(changed)}; draw into another folder")


def check_draws_text(model: Path) -> None:
    """Checks that a folder is a pipeline's which draws from a prompt alone; a UserError if not."""
    name = class_name_of(model)
    if name in getattr(family_of(name), "EDIT_ONLY", ()):
        raise UserError(
            f"{model} is a {name}, which edits pictures and cannot draw from a prompt alone; give a text-to-image "
            "pipeline of its family, or score its edits by danceopd evaluate gedit"
        )


def load_drawer(how: Drawing) -> Callable[[str, list[int]], list]:
    """Loads what draws a prompt: draw(prompt, seeds) gives one PIL picture a seed.

    The noise is drawn on the CPU, each picture's by its own seed.

    Raises:
        UserError: As load_pipeline.
    """
    pipeline = load_pipeline(how.model, how.lora, how.transformer, how.device, how.dtype, how.offload)
    size = (how.resolution, how.resolution) if how.resolution else None
    options = call_options(pipeline, how.guidance_scale, size, how.num_inference_steps, how.max_sequence_length)

    def draw(prompt: str, seeds: list[int]) -> list:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompt=prompt, num_images_per_prompt=len(seeds), generator=generators, **options).images

    return draw
