"""`danceopd train` and `danceopd plan`."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command, add_config, add_overrides
from danceopd.support.errors import UserError

# The keys of support.cards.CARDS, whose import takes torch's time.
CARDS = ("h100", "h100-pcie", "h200", "b200", "a100", "a100-40", "l40s", "rtx-4090", "rtx-5090")


def add_train(commands) -> None:
    """Adds `danceopd train`."""
    parser = add_command(commands, "train", run_train, "train a student as a configuration says")
    add_config(parser)
    parser.add_argument("--overwrite", action="store_true", help="start again where a finished or other run lies")
    parser.add_argument(
        "--dry-run", action="store_true", help="load no weight: check files, count parameters, memory and evaluations"
    )
    parser.add_argument(
        "--download", action="store_true", help="with --dry-run: download what is named by an id of the hub"
    )
    parser.add_argument(
        "--deepspeed", type=Path, metavar="JSON", help="DeepSpeed's settings (with several processes: ZeRO stage 3)"
    )
    parser.add_argument(
        "--patience", type=float, default=900, metavar="SECONDS", help="until a process counts as hung (%(default)g)"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    add_overrides(parser, "training.max_steps=4")


def add_plan(commands) -> None:
    """Adds `danceopd plan`."""
    parser = add_command(
        commands, "plan", run_plan, "estimate whether a run fits on so many cards, and how long it takes"
    )
    parser.set_defaults(dry_run=True, download=False)  # it loads nothing
    add_config(parser)
    parser.add_argument("--gpus", type=int, required=True, help="cards, 8 in a machine")
    parser.add_argument("--gpu", choices=CARDS, default="h100", help="the card: %(choices)s (%(default)s)")
    parser.add_argument("--deepspeed", type=Path, metavar="JSON", help="DeepSpeed's settings: sizes of its buckets")
    add_overrides(parser, "training.batch_size=64")


def run_train(args: argparse.Namespace) -> int | None:
    """Trains, or with --dry-run says what a training takes; returns 2 where it cannot start."""
    from danceopd.api import builder_of, examiner_of
    from danceopd.config.reading import load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from danceopd.planning.dry_run import dry_run

        findings = dry_run(config, examiner_of(config))
        print(findings.text())
        return 2 if findings.problems else 0
    from danceopd.training.loop import train
    from danceopd.training.zero.launch import Watch, begin, guard

    ranks, settings = begin(args.deepspeed, config.training.device, args.patience)
    watch, folder, build = Watch(ranks, args.patience), config.training.output_dir, builder_of(config)
    guard(ranks, folder, train, config, build, args.overwrite, ranks, settings, watch.at)
    if ranks.rank:
        return
    print(f"student: {folder / ('student' if config.model else 'student.safetensors')}")
    print(f"log:     {folder / 'log.jsonl'}\nnext:    danceopd report {folder}")
    if config.model:
        print(f"         danceopd export {folder} -o FOLDER")


def run_plan(args: argparse.Namespace) -> int:
    """Prints the plan; returns 2 where the run cannot start."""
    from danceopd.api import examiner_of
    from danceopd.config.reading import load_config
    from danceopd.planning.cluster import plan
    from danceopd.training.zero.settings import read_deepspeed

    if args.gpus < 1:
        raise UserError("--gpus must be at least 1")
    settings = read_deepspeed(args.deepspeed) if args.deepspeed else None
    config = load_config(args.config, args.overrides)
    planned = plan(config, examiner_of(config), args.gpus, args.gpu, settings)
    print(planned.text())
    return 2 if planned.findings.problems else 0
