"""`danceopd train` and `danceopd plan`."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command, add_config, add_overrides, real, whole

# The keys of support.cards.CARDS, whose import takes torch's time.
CARDS = ("h100", "h100-pcie", "h200", "b200", "a100", "a100-40", "l40s")
CARDS += ("rtx-3090", "rtx-4080", "rtx-4090", "rtx-5090")


def add_train(commands) -> None:
    """Adds `danceopd train`."""
    parser = add_command(
        commands,
        "train",
        run_train,
        "train a student as a configuration says, or go on where a run stopped",
        shows_bar=True,
        example="danceopd train --config configs/demo.yaml training.max_steps=50 training.output_dir=runs/short\n"
        "danceopd train --config configs/demo.yaml --dry-run",
    )
    add_config(parser)
    parser.add_argument("--overwrite", action="store_true", help="start again where a finished run or another one lies")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and say what the run takes; load no weights"
    )
    parser.add_argument(
        "--download", action="store_true", help="with --dry-run, download what is named by an id of the hub"
    )
    parser.add_argument(
        "--deepspeed",
        type=Path,
        metavar="JSON",
        help="DeepSpeed's settings (default: with several processes, ZeRO stage 3)",
    )
    parser.add_argument(
        "--patience",
        type=real(above=0),
        default=900,
        metavar="SECONDS",
        help="how long a process of several may be silent before all end (default: %(default)g)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    add_overrides(parser, "training.max_steps=4")


def add_demo(commands) -> None:
    """Adds `danceopd demo`."""
    parser = add_command(
        commands,
        "demo",
        run_demo,
        "train a student that draws and edits on the picture world, and write its report",
        shows_bar=True,
        example="danceopd demo\ndanceopd demo training.max_steps=200 training.output_dir=runs/short",
    )
    parser.set_defaults(
        config=Path("configs/demo.yaml"), overwrite=False, dry_run=False, deepspeed=None, patience=900.0
    )
    add_overrides(parser, "training.max_steps=200")


def run_demo(args: argparse.Namespace) -> int | None:
    """Trains as configs/demo.yaml says, or goes on there, and reports."""
    from danceopd.cli.runs import run_report
    from danceopd.config.reading import load_config

    run_train(args)
    args.folder = load_config(args.config, args.overrides).training.output_dir
    return run_report(args)


def add_plan(commands) -> None:
    """Adds `danceopd plan`."""
    parser = add_command(
        commands,
        "plan",
        run_plan,
        "estimate whether a run fits on so many cards, and how long it takes",
        example="danceopd plan --config configs/models/z-image-c.yaml --gpus 8 --gpu h100",
    )
    parser.set_defaults(dry_run=True, download=False)  # it loads nothing
    add_config(parser)
    parser.add_argument(
        "--gpus", type=whole(1), default=1, metavar="N", help="number of cards, 8 in a machine (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu",
        "--card",
        type=_card,
        choices=CARDS,
        default="h100",
        metavar="CARD",
        help="the card: %(choices)s; 4090 stands for rtx-4090 (default: %(default)s)",
    )
    parser.add_argument(
        "--deepspeed", type=Path, metavar="JSON", help="DeepSpeed's settings, which say the sizes of its buckets"
    )
    add_overrides(parser, "training.batch_size=64")


def _card(name: str) -> str:
    """Takes "4090" and "RTX 4090" for the key of that card."""
    name = name.lower().replace(" ", "-")
    return f"rtx-{name}" if f"rtx-{name}" in CARDS else name


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
    from danceopd.planning.dry_run import with_memory_chosen
    from danceopd.training.loop import train
    from danceopd.training.zero.launch import Watch, begin, guard
    from danceopd.training.zero.settings import for_ranks

    ranks, settings = begin(args.deepspeed, config.training.device, args.patience)
    if settings is not None:
        config, said = for_ranks(config)
        for line in said if not ranks.rank else ():
            print(f"warning: {line}")
    config = with_memory_chosen(config, examiner_of(config), args.overwrite)
    watch, folder, build = Watch(ranks, args.patience), config.training.output_dir, builder_of(config)
    guard(watch, folder, train, config, build, args.overwrite, ranks, settings, watch.at)
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

    settings = read_deepspeed(args.deepspeed) if args.deepspeed else None
    config = load_config(args.config, args.overrides)
    planned = plan(config, examiner_of(config), args.gpus, args.gpu, settings)
    print(planned.text())
    return 2 if planned.findings.problems else 0
