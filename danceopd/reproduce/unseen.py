"""Whether a student edits objects that its edit source never saw, and that its text-to-image source knows.

The narrow edit source and the base saw edits of half of the classes; both saw all of them drawn.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from danceopd.config.sections import Config
from danceopd.core.fields import Field
from danceopd.miniature.edits import ALL, HALF
from danceopd.miniature.evaluate import Canvas, field_of, score_gedit
from danceopd.miniature.shipped import shipped_sources
from danceopd.reproduce import absorbing
from danceopd.reproduce.matrix import override_lines
from danceopd.reproduce.miniature import canvas_of, lora_of, merged, prepared
from danceopd.reproduce.results import once

NARROW = "edit-half"  # the source, and the capability of the data that it learned from

UNSEEN = ALL[len(HALF) :]

GROUPS = {"gedit_seen": HALF, "gedit_unseen": UNSEEN}  # what a metric's pictures show


def overrides(work: Path, config: Config) -> list[str]:
    """Returns the overrides that name a run's data and the narrow source, which are made where they are not there."""
    folder = work / "unseen"
    rows = prepared(folder, config.model, ("t2i", "edit", NARROW))
    own = {f"capabilities.{name}.data.prepared": str(rows) for name in config.capabilities}
    lora = lora_of(folder / "sources", NARROW)
    return override_lines({**own, "sources.edit.lora": [{"path": str(lora)}]})


def measure(canvas: Canvas, field: Field, config: Config) -> dict[str, float]:
    """Measures text-to-image, edits of objects that the narrow source saw, and edits of those that it never saw.

    Args:
        canvas: The model's.
        field: The student, a source or a merge.
        config: Its evaluation says how many pictures of each task and kind.

    Returns:
        Each metric, and "<metric>_error", its standard error over pictures.
    """
    draw, evaluation, found = canvas.drawer(field), config.evaluation, absorbing.measure(canvas, field, config)
    for metric, classes in GROUPS.items():
        marks = score_gedit(draw, evaluation.seed, evaluation.per_kind, classes=classes)
        found |= {metric: marks["average"], f"{metric}_error": marks["standard_error"]}
    return found


def measure_run(folder: Path, config: Config) -> dict[str, float]:
    """Measures the exported LoRA of a finished run."""
    return measure(canvas_of(config), field_of(config.model, folder / "student"), config)


def untrained(config: Config, folder: Path) -> Iterator[tuple[str, str, dict]]:
    """Measures the base, both sources, their mean, and an edit source that saw all objects.

    Args:
        config: The table's.
        folder: Keeps what is measured, so that a killed run goes on.

    Yields:
        (row, kind, metrics).
    """
    canvas = canvas_of(config)
    loras = {name: source.lora[0].path for name, source in config.sources.items()}
    fields: dict[str, Callable[[], Field]] = {
        "base": partial(field_of, config.model),
        **{f"source_{name}": partial(field_of, config.model, path) for name, path in loras.items()},
        "source_edit_all": partial(field_of, config.model, shipped_sources()["edit"].parent),
        "merge_cat": partial(merged, config.model, list(loras.values()), "cat", 1 / len(loras)),
    }
    for name, load in fields.items():
        kind = "merge" if name.startswith("merge_") else "source"
        yield name, kind, once(folder / f"{name}.json", lambda load=load: measure(canvas, load(), config))
