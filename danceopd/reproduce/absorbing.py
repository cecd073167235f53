"""What of an operator a student absorbs: the score of the source, of the operator over it, and of the student.

All are drawn with the same prompts and noise; the source and the student take one evaluation a step.
"""

from collections.abc import Iterator
from pathlib import Path

from danceopd.config.expressions import evaluations
from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.core.fields import Field
from danceopd.miniature.build import build
from danceopd.miniature.evaluate import Canvas, field_of, score_geneval
from danceopd.miniature.looks import IMAGE_SIZE
from danceopd.models.backbones import flux2
from danceopd.reproduce.matrix import ABSORBED_SCALES, OPERATORS, override_lines
from danceopd.reproduce.miniature import canvas_of
from danceopd.reproduce.results import once

ABSORBED = "operator"  # the source that configs/miniature_operators.yaml asks


def measure(canvas: Canvas, field: Field, config: Config, scales: tuple[float, ...] = (1,)) -> dict[str, float]:
    """Measures GenEval's overall under guidance scales at inference, of which 1 is none.

    Args:
        canvas: The model's.
        field: The student, the source or an operator over it.
        config: Its evaluation says how many pictures of each task.
        scales: The guidance scales.

    Returns:
        "geneval_overall" at scale 1, "beta2" at 2 and so on, each with its "_error" over pictures.
    """
    found, evaluation = {}, config.evaluation
    for scale in scales:
        name = "geneval_overall" if scale == 1 else f"beta{scale:g}"
        marks = score_geneval(canvas.drawer(field, scale), evaluation.seed, evaluation.per_task)
        found |= {name: marks["overall"], f"{name}_error": marks["standard_error"]}
    return found


def measure_run(folder: Path, config: Config, row: str) -> dict[str, float]:
    """Measures the exported LoRA of a finished run, under guidance too where it absorbed guidance alone."""
    scales = ABSORBED_SCALES if row.startswith("guided") else (1,)
    return measure(canvas_of(config), field_of(config.model, folder / "student"), config, scales)


def untrained(config: Config, folder: Path) -> Iterator[tuple[str, str, dict]]:
    """Measures the source under guidance, and each operator over it.

    Args:
        config: The table's.
        folder: Keeps what is measured, so that a killed run goes on.

    Yields:
        (row, kind, metrics); an operator's hold "evaluations" too, those of a step in the mean over its noise levels.
    """
    canvas = canvas_of(config)

    def source() -> dict[str, float]:
        return measure(canvas, field_of(config.model, config.sources["t2i"].lora[0].path), config, ABSORBED_SCALES)

    yield "source_t2i", "source", once(folder / "source_t2i.json", source)
    for row, overrides in OPERATORS.items():
        own = parse_config(config.to_dict(), override_lines(overrides), row)

        def operator(own: Config = own) -> dict[str, float]:
            parts = build(own)
            sigmas = flux2.sigmas(own.model, own.evaluation.num_inference_steps, IMAGE_SIZE, IMAGE_SIZE)
            asked = evaluations(own, ABSORBED, sigmas[:-1]).double().mean()
            return measure(canvas, parts.fields[0], own) | {"evaluations": float(asked)}

        yield f"operator_{row}", "operator", once(folder / f"operator_{row}.json", operator)
