"""danceopd train and plan."""

import argparse
from pathlib import Path

from danceopd.support.errors import UserError


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, for example configs/demo.yaml")
    parser.add_argument("--overwrite", action="store_true", help="start again where a finished or other run lies")
    parser.add_argument(
        "--dry-run", action="store_true", help="load no weight: check files, count parameters, memory and evaluations"
    )
    parser.add_argument(
        "--deepspeed", type=Path, metavar="JSON", help="DeepSpeed's settings (with several processes: ZeRO stage 3)"
    )
    parser.add_argument(
        "--patience", type=float, default=900, metavar="SECONDS", help="until a process counts as hung (%(default)g)"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.max_steps=4")


def run_train(args: argparse.Namespace) -> int | None:
    from danceopd.config.reading import load_config

    if args.dry_run:
        from danceopd.planning.dry_run import dry_run

        plan = dry_run(load_config(args.config, args.overrides))
        print(plan.text())
        return 2 if plan.problems else 0
    from danceopd.training.assembly.build import build
    from danceopd.training.loop import train
    from danceopd.training.zero.launch import Watch, begin, guard

    config = load_config(args.config, args.overrides)
    ranks, settings = begin(args.deepspeed, config.training.device, args.patience)
    watch = Watch(ranks, args.patience)
    folder = guard(ranks, config.training.output_dir, train, config, build, args.overwrite, ranks, settings, watch.at)
    if ranks.rank:
        return
    print(f"student: {folder / ('student' if config.model else 'student.safetensors')}")
    print(f"log:     {folder / 'log.jsonl'}\nnext:    danceopd report {folder}")
    if config.model:
        print(f"         danceopd export {folder} -o FOLDER")


def run_plan(args: argparse.Namespace) -> int:
    from danceopd.config.reading import load_config
    from danceopd.planning.cluster import plan
    from danceopd.training.zero.settings import read_deepspeed

    if args.gpus < 1:
        raise UserError("--gpus must be at least 1")
    settings = read_deepspeed(args.deepspeed) if args.deepspeed else None
    planned = plan(load_config(args.config, args.overrides), args.gpus, args.gpu, settings)
    print(planned.text())
    return 2 if planned.plan.problems else 0
