"""What a narrow frozen base costs in score: the miniature's sources, their adapters on a base in FP8, int8 or NF4.

    python benchmarks/precision_scores.py --json benchmarks/results/precision-scores.json

Each source draws its own benchmark, pictures or edits, with the same prompts and noise in every precision, so that the
difference from the base in bfloat16 is taken picture by picture. The adapter is added to each product, as in training.
"""

import argparse
import json
from pathlib import Path

import torch

from danceopd.core.fields import Field
from danceopd.miniature.evaluate import Canvas, Draw, drawn_prompts, edit_marks
from danceopd.miniature.scores import geneval_correct
from danceopd.miniature.shipped import PIPELINE, shipped_sources
from danceopd.models.backbones import flux2, pipeline_class_of
from danceopd.models.eight_bit import to_eight_bit
from danceopd.models.fp8 import to_fp8
from danceopd.models.lora_files import load_lora
from danceopd.models.nf4 import to_nf4
from danceopd.models.shared_base import SharedBase
from danceopd.support.devices import machine
from danceopd.support.files import write_atomic
from danceopd.world.scoring import summary

PRECISIONS = {"bf16": lambda transformer: transformer, "fp8": to_fp8, "int8": to_eight_bit, "nf4": to_nf4}


def source_on(precision: str, lora: Path) -> Field:
    """Loads the miniature's base in a precision, with a LoRA on it, as a training does."""
    transformer = flux2.load_transformer(PIPELINE, torch.bfloat16)
    factors = load_lora(lora, transformer, pipeline_class_of(PIPELINE))
    return SharedBase(PRECISIONS[precision](transformer), [factors], flux2.velocity).field(0)


def marks(draw: Draw, source: str, seed: int, pictures: int) -> tuple[torch.Tensor, list[str]]:
    """Draws a source's own benchmark.

    Returns:
        The mark of each picture, [B], and its task or kind.
    """
    if source == "edit":
        edits, scores = edit_marks(draw, seed, pictures)
        return scores["o"], [edit.kind for edit in edits]
    prompts, detection = drawn_prompts(draw, seed, pictures)
    return geneval_correct(prompts, detection).float(), [prompt.task for prompt in prompts]


def measure(source: str, seed: int, pictures: int) -> list[dict]:
    """Scores one source in every precision.

    Returns:
        A row of each: "score" with its standard error over pictures, and "difference" from bfloat16 with its own.
    """
    canvas, rows, whole = Canvas(PIPELINE), [], None
    for precision in PRECISIONS:
        found, groups = marks(canvas.drawer(source_on(precision, shipped_sources()[source])), source, seed, pictures)
        whole = found if whole is None else whole
        score, change = summary(found, groups, "mean"), summary(found - whole, groups, "mean")
        row = {"source": source, "precision": precision, "score": score["mean"], "error": score["standard_error"]}
        rows.append({**row, "difference": change["mean"], "difference_error": change["standard_error"]})
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="What a narrow frozen base costs in score, on the miniature.")
    parser.add_argument("--pictures", type=int, default=60, help="of each task and kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of prompts and noise (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    result = {
        "benchmark": "scores of a narrow base",
        "machine": machine(),
        "seed": args.seed,
        "pictures": args.pictures,
        "rows": [],
    }
    print("source  precision           score           difference")
    for source in ("t2i", "edit"):
        for row in measure(source, args.seed, args.pictures):
            result["rows"].append(row)
            score, change = f"{row['score']:.3f} ± {row['error']:.3f}", "–"
            if row["precision"] != "bf16":
                change = f"{row['difference']:+.3f} ± {row['difference_error']:.3f}"
            print(f"{source:<6}  {row['precision']:<9}  {score:>14}  {change:>18}", flush=True)
    if args.json:
        write_atomic(args.json, (json.dumps(result, indent=1) + "\n").encode())
    return result


if __name__ == "__main__":
    main()
