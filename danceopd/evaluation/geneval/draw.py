"""GenEval's pictures: a diffusers pipeline draws the benchmark's prompts into the benchmark's layout."""

import hashlib
import inspect
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from danceopd.evaluation.geneval.layout import prompt_folder
from danceopd.models.loading import class_name_of
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.ranks import ALONE, Ranks, agreed

MARK = "generation.json"  # what drew a folder's pictures


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; None leaves it to the pipeline.

    model: a diffusers pipeline's folder; transformer: a folder whose transformer takes the place of its own; lora: a
    folder or file in any layout that load_lora reads; resolution: of both sides, in pixels; offload: the pipeline's
    parts wait in host memory, one at a time is on the card.
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


def sample_seed(seed: int, index: int, sample: int) -> int:
    """Of a picture's noise: its prompt's place in the metadata and its number, whatever is drawn beside it."""
    return int.from_bytes(hashlib.blake2b(repr((seed, index, sample)).encode(), digest_size=7).digest(), "little")


def draw_pictures(
    metadata: list[dict], folder: Path, how: Drawing, ranks: Ranks = ALONE, progress: Callable = lambda items: items
) -> int:
    """Draw what is not there yet of this rank's prompts (every ranks.size-th); returns how many pictures it drew.

    Each picture is written atomically, so that after a kill the same call goes on. progress: wraps the list of what is
    left (tqdm fits). Raises UserError for a folder whose pictures something else drew, and for a model or LoRA that
    cannot be loaded.
    """
    agreed(ranks, check_draws_text, how.model)
    agreed(ranks, check_mark, metadata, folder, how)
    mine = range(ranks.rank, len(metadata), ranks.size)
    left = []
    for index in mine:
        missing = [k for k in range(how.samples) if not _picture(folder, index, k).exists()]
        left += [(index, missing[i : i + how.batch_size]) for i in range(0, len(missing), how.batch_size)]
    draw = agreed(ranks, lambda: load_pipeline(how) if left else None)  # before anything is written
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
    """What a picture depends on, apart from its prompt and number. Moving a model changes nothing."""
    networks = {name: getattr(how, name) for name in ("model", "transformer", "lora")}
    return {
        **{name: path and contents(path) for name, path in networks.items()},
        "seed": how.seed,
        "num_inference_steps": how.num_inference_steps,
        "guidance_scale": how.guidance_scale,
        "resolution": how.resolution,
        "dtype": str(how.dtype).removeprefix("torch."),
    }


def contents(path: Path) -> str:
    """A fingerprint of a file or folder. Raises UserError if it is not there."""
    from danceopd.models.fingerprint import fingerprint

    if not path.exists():
        raise UserError(f"there is nothing at {path}; give the folder or file of a model")
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return fingerprint(path)


def check_mark(metadata: list[dict], folder: Path, how: Drawing) -> None:
    """Raises UserError where a folder holds other prompts' or another model's pictures, or another tool's."""
    there = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()) if folder.is_dir() else []
    for place in there:
        index, line = int(place.name), place / "metadata.jsonl"
        if not line.exists():
            continue
        try:
            same = index < len(metadata) and json.loads(line.read_text(encoding="utf-8")) == metadata[index]
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
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in now if before[key] != now[key]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; draw into another folder") from None
    if changed:
        raise UserError(f"{folder} holds pictures drawn with another {', '.join(changed)}; draw into another folder")


def check_draws_text(model: Path) -> None:
    """Raises UserError for a folder that is no pipeline, and for one that draws nothing from a prompt alone."""
    if (name := class_name_of(model)).startswith("QwenImageEdit"):
        raise UserError(
            f"{model} is a {name}, which edits pictures and cannot draw from a prompt alone; give a text-to-image "
            "pipeline, such as Qwen-Image, or score its edits by danceopd evaluate gedit"
        )


def load_pipeline(how: Drawing) -> Callable:
    """draw(prompt, seeds) -> PIL pictures, one a seed; the noise is drawn on the CPU, each picture's by its own seed.

    Raises UserError for a folder that is no pipeline, and for weights that do not fit.
    """
    from diffusers import DiffusionPipeline

    from danceopd.models.backbones import backbone_of
    from danceopd.models.loading import load

    own = {}
    if how.transformer:
        own["transformer"] = backbone_of(how.model).load_transformer(how.transformer, how.dtype)
    pipeline = load(DiffusionPipeline, how.model, dtype=how.dtype, use_safetensors=True, **own)
    if how.lora:
        add_lora(pipeline, how.lora)
    if how.offload:
        pipeline.enable_model_cpu_offload(device=how.device)
    else:
        pipeline.to(how.device)
    pipeline.set_progress_bar_config(disable=True)
    options = call_options(pipeline, how)

    def draw(prompt: str, seeds: list[int]) -> list:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(prompt=prompt, num_images_per_prompt=len(seeds), generator=generators, **options).images

    return draw


def add_lora(pipeline, path: Path) -> None:
    """Load a LoRA beside a pipeline's weights: all of it, or a UserError."""
    from danceopd.models.lora_algebra import named_factors
    from danceopd.models.lora_files import load_lora

    part = "transformer" if hasattr(pipeline, "transformer") else "unet"
    lora = load_lora(path, getattr(pipeline, part), type(pipeline))
    pipeline.load_lora_weights(named_factors(lora, f"{part}."))


def call_options(pipeline, how: Drawing) -> dict:
    """What the pipeline is called with beside prompt and noise."""
    takes = inspect.signature(pipeline.__call__).parameters
    options = {"num_inference_steps": how.num_inference_steps}
    if type(pipeline).__name__.startswith("QwenImage"):  # whose guidance needs a negative prompt, else there is none
        guided = how.guidance_scale is None or how.guidance_scale > 1
        options |= {"true_cfg_scale": how.guidance_scale, "negative_prompt": " " if guided else None}
    else:
        options["guidance_scale"] = how.guidance_scale
    if how.resolution:
        options |= {"height": how.resolution, "width": how.resolution}
        if "max_area" in takes:  # Kontext fits any size to it
            options["max_area"] = how.resolution**2
    return {key: value for key, value in options.items() if value is not None}
