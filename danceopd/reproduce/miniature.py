"""The table of the miniature: the data that its runs share, and how students, sources and merges are measured."""

import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from danceopd.config.sections import Config
from danceopd.core.fields import Field
from danceopd.core.rollout import sample
from danceopd.data.cache import key_of
from danceopd.data.prepare import prepare
from danceopd.data.prepared import PreparedData
from danceopd.miniature import sources
from danceopd.miniature.data import write_miniature
from danceopd.miniature.evaluate import Canvas, field_of, score_gedit, score_geneval
from danceopd.miniature.looks import IMAGE_SIZE
from danceopd.miniature.pipeline import TEXT_LENGTH
from danceopd.miniature.shipped import PIPELINE, shipped_sources
from danceopd.models.backbones import flux2, pipeline_class_of
from danceopd.models.lora_algebra import Lora, merge_into
from danceopd.models.lora_files import load_lora
from danceopd.models.lora_merges import COMBINATIONS, WEIGHTS, combined
from danceopd.models.shared_base import SharedBase
from danceopd.reproduce.matrix import DRAWN_SAMPLES, DRAWN_STEPS
from danceopd.reproduce.results import once
from danceopd.support.bars import bar
from danceopd.support.files import write_atomic
from danceopd.world.scoring import HELD_OUT_SEED

SEED = 100  # of the samples


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it: runs in other processes want the same of it, which is made once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepared(folder: Path, model: Path, capabilities: Sequence[str] = ("t2i", "edit")) -> Path:
    """Makes the data that the runs of a table share, once: pictures of the world.

    Args:
        folder: Where they lie.
        model: The miniature's folder.
        capabilities: Those that have samples (miniature.data.CAPABILITIES).

    Returns:
        The prepared rows.
    """
    with _alone(folder):
        rows = folder / "cache" / "manifest.jsonl"
        if not rows.exists():
            manifest = folder / "data" / "manifest.jsonl"
            if not manifest.exists():
                write_miniature(manifest.parent, capabilities, DRAWN_SAMPLES, SEED)
            prepare(
                manifest,
                model,
                rows.parent,
                resolution=IMAGE_SIZE,
                batch_size=64,
                entries_per_shard=1024,
                max_sequence_length=TEXT_LENGTH,
            )
        return rows


def drawn(folder: Path, config: Config) -> Path:
    """Makes the rows of `prepared` with pictures that the sources of a configuration draw in the world's place."""
    rows, path = prepared(folder, config.model), folder / "cache" / "drawn.jsonl"
    with _alone(folder):
        if not path.exists():
            files = {name: config.sources[one.source].lora[0].path for name, one in config.capabilities.items()}
            draw_rows(rows, path, config.model, {name: partial(field_of, config.model, files[name]) for name in files})
    return path


def lora_of(folder: Path, name: str) -> Path:
    """Returns the folder of a source's LoRA; one that doesn't ship is trained in a folder, once."""
    if file := shipped_sources().get(name):
        return file.parent
    with _alone(folder):
        return folder / name if (folder / name).is_dir() else sources.train(folder, PIPELINE, name)


@torch.inference_mode()
def draw_rows(
    rows: Path, path: Path, model: Path, fields: dict[str, Callable[[], Field]], pictures: dict[str, int] | None = None
) -> None:
    """Writes prepared rows whose pictures are those that each capability's source draws.

    Args:
        rows: The prepared rows.
        path: The file to write.
        model: The miniature's folder.
        fields: Loads the source of each capability.
        pictures: Rows of each capability; all if not given.
    """
    head, *_ = rows.read_text(encoding="utf-8").splitlines()
    lines, sigmas = [head], flux2.sigmas(model, DRAWN_STEPS, IMAGE_SIZE, IMAGE_SIZE)
    shape = flux2.latent_shape(model, IMAGE_SIZE, IMAGE_SIZE)
    for name, load in fields.items():
        data, generator, field = PreparedData(rows, name), torch.Generator().manual_seed(SEED), load()
        count = min(len(data), pictures[name]) if pictures else len(data)
        for start in bar(range(0, count, 64), f"pictures of {name}"):
            index = list(range(start, min(start + 64, count)))
            noise = torch.randn(len(index), *shape, generator=generator)
            latents = sample(field, noise, data.condition(index, [False] * len(index)), sigmas)
            keys = [key_of("drawn", name, str(i)) for i in index]
            data.cache.write({key: {"latents": one.clone()} for key, one in zip(keys, latents, strict=True)})
            lines += [json.dumps({**data.rows[i], "target": key}) for i, key in zip(index, keys, strict=True)]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def measure(
    canvas: Canvas, field: Field, config: Config, seed: int | None = None, pictures: int | None = None
) -> dict[str, float]:
    """Measures one field with noise and scenes that no training saw, and on held-out pairs of classes.

    Args:
        canvas: The model's.
        field: The student, a source or a merge.
        config: Its evaluation says how many pictures of each task and kind.
        seed: Of prompts and noise; the evaluation's own if not given.
        pictures: Of each task and kind; the evaluation's own numbers if not given, which include held-out pairs.

    Returns:
        Each metric, and "<metric>_error", its standard error over pictures.
    """
    evaluation = config.evaluation
    draw = canvas.drawer(field)
    seed = evaluation.seed if seed is None else seed
    t2i = score_geneval(draw, seed, pictures or evaluation.per_task)
    edit = score_gedit(draw, seed, pictures or evaluation.per_kind)
    found = {"geneval_overall": t2i["overall"], "geneval_overall_error": t2i["standard_error"]}
    found |= {"gedit_average": edit["average"], "gedit_average_error": edit["standard_error"]}
    if pictures is None:
        other = score_geneval(draw, seed + HELD_OUT_SEED, evaluation.per_task, "held_out")
        found |= {"geneval_held_out": other["overall"], "geneval_held_out_error": other["standard_error"]}
    return found


def measure_run(folder: Path, config: Config, seed: int | None = None) -> dict[str, float]:
    """Measures the exported LoRA of a finished run, as a plain pipeline merges it."""
    return measure(canvas_of(config), field_of(config.model, folder / "student"), config, seed)


def canvas_of(config: Config) -> Canvas:
    """Loads what a run's model draws with beside its transformer."""
    return Canvas(config.model, config.evaluation.num_inference_steps)


def untrained(config: Config, validation_seed: int, folder: Path) -> Iterator[tuple[str, str, dict]]:
    """Measures the base, the sources, and every merge of PEFT at its best weight on validation prompts.

    Args:
        config: Names the model and the sources.
        validation_seed: Of the prompts that a merge's weight is chosen on.
        folder: Keeps what is measured, so that a killed run goes on.

    Yields:
        (row, kind, metrics).
    """
    canvas, few = canvas_of(config), {"seed": validation_seed, "pictures": config.evaluation.quick}

    def measured(name: str, make: Callable[[], Field], **how) -> dict[str, float]:
        return once(folder / f"{name}.json", lambda: measure(canvas, make(), config, **how))

    yield "base", "source", measured("base", partial(field_of, config.model))
    loras = {name: source.lora[0].path for name, source in config.sources.items()}
    for name, path in loras.items():
        yield f"source_{name}", "source", measured(f"source_{name}", partial(field_of, config.model, path))
    for combination in COMBINATIONS:
        makers = {w: partial(merged, config.model, list(loras.values()), combination, w) for w in WEIGHTS}
        tried = {w: _merit(measured(f"validation-{combination}-{w:g}", make, **few)) for w, make in makers.items()}
        best = max(tried, key=tried.get)
        row = f"merge_{combination}"
        yield row, "merge", {**measured(f"{row}-{best:g}", makers[best]), "chosen": str(best)}


def _merit(metrics: dict[str, float]) -> float:
    """Returns one number to choose by: GenEval's overall plus a tenth of the edits' average."""
    return metrics["geneval_overall"] + metrics["gedit_average"] / 10


@torch.no_grad()
def merged(model: Path, loras: list[Path], combination: str, weight: float) -> Field:
    """Merges LoRAs into the base by one of PEFT's combinations.

    Args:
        model: The pipeline's folder.
        loras: Their files or folders.
        combination: One of COMBINATIONS.
        weight: Of each of them.
    """
    transformer = flux2.load_transformer(model)
    factors = [load_lora(path, transformer, pipeline_class_of(model)) for path in loras]
    whole = combined(factors, combination, [weight] * len(loras))
    return with_lora(transformer, whole)


@torch.no_grad()
def with_lora(transformer: nn.Module, lora: Lora) -> Field:
    """Adds a LoRA to the weights of the miniature's transformer itself, and returns its field."""
    return SharedBase(merge_into(transformer, lora), [], flux2.velocity).field(-1)
