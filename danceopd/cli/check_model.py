"""`danceopd check-model`: whether a family's field is its diffusers pipeline's."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import DTYPES, add_command
from danceopd.support.errors import UserError


def add_check_model(commands) -> None:
    """Adds `danceopd check-model`."""
    parser = add_command(
        commands,
        "check-model",
        run_check_model,
        "compare a model's field with its diffusers pipeline, stage by stage",
        example="danceopd check-model miniature --resolution 64",
    )
    parser.add_argument("model", type=Path, help="the folder of a diffusers pipeline")
    parser.add_argument("--task", choices=("t2i", "edit"), help="(all that the pipeline does)")
    parser.add_argument("--resolution", type=int, default=1024, help="side of the picture in pixels (%(default)s)")
    parser.add_argument("--num-inference-steps", type=int, default=2, help="solver steps (%(default)s)")
    parser.add_argument("--references", type=int, default=1, help="source pictures of an edit (%(default)s)")
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=4.0,
        help="guidance of a second picture; 1 draws none (%(default)s)",
    )
    parser.add_argument(
        "--tolerance", type=float, help="largest difference that passes (1e-4 in float32, 2e-2 in half precision)"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="the weights' dtype (%(default)s)")


def run_check_model(args: argparse.Namespace) -> int:
    """Prints each stage's difference; returns 1 where one is too large."""
    if min(args.resolution, args.num_inference_steps, args.references) < 1:
        raise UserError("--resolution, --num-inference-steps and --references must be positive")
    if args.tolerance is not None and args.tolerance <= 0:
        raise UserError(f"--tolerance must be positive, got {args.tolerance:g}")

    import torch

    from danceopd.evaluation.check_model import How, check_model, table, tasks_of
    from danceopd.support.devices import find_own_device

    tolerance = args.tolerance or (1e-4 if args.dtype == "float32" else 2e-2)
    where = {"device": str(find_own_device(args.device)), "dtype": getattr(torch, args.dtype)}
    size, wrong = (args.resolution, args.resolution), 0
    for task in [args.task] if args.task else tasks_of(args.model):
        for guidance in dict.fromkeys((1.0, args.guidance_scale)):
            how = How(task, size, args.num_inference_steps, guidance, args.references, **where)
            stages, first = check_model(args.model, how, tolerance)
            print(f"\n{task}, {'without guidance' if guidance == 1 else f'with guidance {guidance:g}'}")
            print("\n".join(f"  {line}" for line in table(stages)))
            wrong += first is not None
            print(f"differs first in: {first.name}" if first else "draws as its pipeline does")
    return int(wrong > 0)
