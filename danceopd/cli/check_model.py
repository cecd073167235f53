"""`danceopd check-model`: whether a family's field is its diffusers pipeline's."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command, add_device, add_resolution, add_steps, real, whole


def add_check_model(commands) -> None:
    """Adds `danceopd check-model`."""
    parser = add_command(
        commands,
        "check-model",
        run_check_model,
        "compare a model's field with its diffusers pipeline, stage by stage",
        example="danceopd check-model miniature --resolution 64",
    )
    parser.add_argument("model", type=Path, help="the diffusers pipeline: a folder, an id of the hub, or miniature")
    parser.add_argument(
        "--task", choices=("t2i", "edit"), help="what is compared (default: all that the pipeline can do)"
    )
    add_resolution(parser, "1024", 1024)
    add_steps(parser, "2", 2)
    parser.add_argument(
        "--references", type=whole(1), default=1, metavar="N", help="source pictures of an edit (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=real(),
        default=4.0,
        metavar="SCALE",
        help="guidance of the second picture; the first has none, and with 1 it is the only one (default: %(default)g)",
    )
    parser.add_argument(
        "--tolerance",
        type=real(above=0),
        metavar="X",
        help="largest difference that passes (default: 1e-4 in float32, 2e-2 in half precision)",
    )
    add_device(parser, "float32")


def run_check_model(args: argparse.Namespace) -> int:
    """Prints each stage's difference; returns 1 where one is too large."""
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
