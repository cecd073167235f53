"""danceopd data."""

import argparse

from danceopd.support.errors import UserError


def run_data_check(args: argparse.Namespace) -> int:
    from danceopd.data.manifest import check_manifest

    problems = check_manifest(args.manifest, args.root, tuple(args.needs_source))
    for problem in problems:
        print(problem)
    print(f"{args.manifest}: " + (f"{len(problems)} problems" if problems else "no problems"))
    return 1 if problems else 0


def run_data_prepare(args: argparse.Namespace) -> None:
    import torch

    from danceopd.data.prepare import prepare
    from danceopd.models.backbones import backbone_of
    from danceopd.support.devices import find_device

    if min(args.resolution, args.batch_size, args.workers) < 1:
        raise UserError("--resolution, --batch-size and --workers must be positive")
    done = prepare(
        args.manifest,
        args.model,
        args.cache,
        backbone_of(args.model),
        resolution=args.resolution,
        root=args.root,
        needs_source=args.needs_source,
        batch_size=args.batch_size,
        workers=args.workers,
        device=str(find_device(args.device)),
        dtype=getattr(torch, args.dtype),
        strict=args.strict,
    )
    for problem in done.problems:
        print(f"left out: {problem}")
    if done.damaged:
        print(f"mended: {len(done.damaged)} damaged shards, {', '.join(done.damaged[:3])}")
    print(f"{done.rows} rows in {done.path}: {done.made} entries encoded, {done.found} found")


def run_data_import(args: argparse.Namespace) -> None:
    from danceopd.data.huggingface import import_dataset

    path, count = import_dataset(args.folder, args.out, args.split, args.task)
    print(f"{count} rows: {path}")
