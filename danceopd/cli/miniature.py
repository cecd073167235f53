"""`danceopd miniature`: says where the small trained pipeline lies, or trains it again."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command, output_folder, refuse_unused, seed, whole

FOLDER = Path("runs/miniature")

WHERE, WRITTEN = {"folder": FOLDER}, {"size": 1000, "seed": 0}
USES = {"list": {}, "train": WHERE | {"only": None}, "card": WHERE, "benchmark": WHERE | WRITTEN}
USES |= {"data": WHERE | WRITTEN | {"capabilities": ["t2i", "edit"]}}


def add_miniature(commands) -> None:
    """Adds `danceopd miniature`."""
    parser = add_command(
        commands,
        "miniature",
        run_miniature,
        "say where the small trained FLUX.2 klein pipeline lies, or train it again",
        example="danceopd miniature",
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("list", "train", "card", "data", "benchmark"),
        default="list",
        metavar="ACTION",
        help="list says where it lies, train makes it again, card scores it and writes its description, data writes "
        "pictures with a manifest, benchmark writes prompts and edits to score by (default: list)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="STAGE", help="with train, these stages alone: vae, base, or a source's name"
    )
    parser.add_argument(
        "--folder",
        type=output_folder,
        help=f"where it is trained, or what is written goes (default: {FOLDER})",
    )
    parser.add_argument(
        "--capabilities",
        nargs="+",
        metavar="NAME",
        help="with data, what the rows are for (default: t2i edit)",
    )
    parser.add_argument(
        "--size",
        type=whole(1),
        metavar="N",
        help="with data, rows of each capability; with benchmark, prompts of each task and edits of each kind "
        "(default: 1000)",
    )
    parser.add_argument("--seed", type=seed, help="seed of what data and benchmark write (default: 0)")


def run_miniature(args: argparse.Namespace) -> None:
    """Lists, trains, or scores and describes."""
    refuse_unused(args, USES)
    if args.action == "train":
        from danceopd.miniature.train import STAGES, train

        train(args.folder, args.only or STAGES, say=lambda stage: print(f"stage: {stage}", flush=True))
    elif args.action == "card":
        from danceopd.miniature.card import publish, write_card

        if args.folder != FOLDER or args.folder.exists():  # with no training at hand, what ships is scored again
            publish(args.folder)
        print(f"wrote {write_card()}")
    elif args.action == "data":
        from danceopd.miniature.data import write_miniature

        print(f"wrote {write_miniature(args.folder, args.capabilities, args.size, args.seed)}")
    elif args.action == "benchmark":
        from danceopd.miniature.benchmark import write_benchmark

        print(f"wrote {write_benchmark(args.folder, args.seed, args.size, args.size)}")
    else:
        from danceopd.miniature.shipped import PIPELINE, shipped_sources

        print(f"pipeline: {PIPELINE}")
        for name, path in shipped_sources().items():
            print(f"source {name}: {path}")
