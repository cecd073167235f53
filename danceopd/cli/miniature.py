"""`danceopd miniature`: says where the small trained pipeline lies, or trains it again."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command


def add_miniature(commands) -> None:
    """Adds `danceopd miniature`."""
    parser = add_command(
        commands, "miniature", run_miniature, "a small trained FLUX.2 klein pipeline, or train it again"
    )
    parser.add_argument("action", nargs="?", choices=("list", "train", "card"), default="list")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages only: vae, base, or a source's name")
    parser.add_argument("--folder", type=Path, default=Path("runs/miniature"), help="where to train (%(default)s)")


def run_miniature(args: argparse.Namespace) -> None:
    """Lists, trains, or scores and describes."""
    if args.action == "train":
        from danceopd.miniature.train import STAGES, train

        train(args.folder, args.only or STAGES, say=lambda stage: print(f"stage: {stage}", flush=True))
    elif args.action == "card":
        from danceopd.miniature.card import write_card

        print(f"wrote {write_card(args.folder)}")
    else:
        from danceopd.miniature.shipped import PIPELINE, shipped_sources

        print(f"pipeline: {PIPELINE}")
        for name, path in shipped_sources().items():
            print(f"source {name}: {path}")
