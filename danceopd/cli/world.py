"""Commands on the embedded network."""

import argparse
import json
from pathlib import Path

from danceopd.support.errors import UserError


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-inference-steps", type=int, default=16, help="solver steps (%(default)s)")
    parser.add_argument("--shift", type=float, default=5.0, help="shift of the noise levels (%(default)s)")
    parser.add_argument("--solver", choices=("euler", "heun", "ab2"), default="euler")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is without guidance (%(default)s)")


def _field_and_sampler(args: argparse.Namespace):
    from danceopd.core.schedule import sigma_grid
    from danceopd.world.files import load_model, resolve_weights
    from danceopd.world.scoring import Sampler, as_field

    network = load_model(resolve_weights(args.checkpoint))
    try:
        sigmas = sigma_grid(args.num_inference_steps, args.shift)
    except ValueError as error:
        raise UserError(str(error)) from None
    size = network.config
    sampler = Sampler(sigmas, args.solver, text_length=size.text_length, image_size=size.image_size)
    return as_field(network, args.guidance_scale), sampler


def run_evaluate(args: argparse.Namespace) -> None:
    from danceopd.report.tables import format_table
    from danceopd.support.files import write_atomic
    from danceopd.world.scoring import score_row

    if args.per_task < 1 or args.per_kind < 1:
        raise UserError("--per-task and --per-kind must be at least 1")
    field, sampler = _field_and_sampler(args)
    name = args.name or Path(args.checkpoint).stem
    row = score_row(name, field, sampler, args.seed, args.per_task, args.per_kind, pictures=args.pictures)
    print(format_table({"rows": [row]}))
    if args.json:
        write_atomic(args.json, (json.dumps(row, indent=1) + "\n").encode())
        print(f"wrote {args.json}")


def run_sample(args: argparse.Namespace) -> None:
    import torch

    from danceopd.support.pictures import save_grid
    from danceopd.world.own_data import load_picture

    field, sampler = _field_and_sampler(args)
    source = None
    if args.source:
        source = load_picture(args.source, sampler.image_size).expand(args.count, -1, -1, -1)
    rows = [] if source is None else [source]
    for prompt in args.prompts:
        rows.append(sampler(field, [prompt] * args.count, source, args.seed))
    save_grid(args.output, [torch.as_tensor(row) for row in rows], scale=6)
    print(f"wrote {args.output}")


def run_sources(args: argparse.Namespace) -> None:
    from danceopd.world import sources
    from danceopd.world.files import SHIPPED, shipped_sources

    unknown = set(args.only or ()) - set(sources.STAGES)
    if unknown:
        raise UserError(f"no source {sorted(unknown)}; there are {', '.join(sources.STAGES)}")
    names = args.only or list(sources.STAGES)
    if args.action == "list":
        print("\n".join(f"{name:8s} {SHIPPED / name}.safetensors" for name in shipped_sources()))
        print(f"scores and how they were trained: {SHIPPED / 'README.md'}")
    elif args.action == "train":
        args.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            print(f"wrote {sources.train_source(name, args.folder)}")
    else:
        print(f"wrote {sources.write_card(args.folder)}")


def run_data_world(args: argparse.Namespace) -> None:
    from danceopd.world.data import write_world

    print(f"wrote {write_world(args.folder, args.capabilities, args.size, args.seed)}")
