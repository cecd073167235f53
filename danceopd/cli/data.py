"""`danceopd data`: checks, prepares, imports and writes training data."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command, add_device, fill_sizes, output_folder, seed
from danceopd.data.bad_rows import ON_BAD_ROW, Problem, shown
from danceopd.support.errors import UserError
from danceopd.support.texts import many


def add_data(commands) -> None:
    """Adds `danceopd data` with its actions."""
    parser = commands.add_parser("data", help="check, encode, import or write training data")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    check = add_command(
        actions,
        "check",
        run_check,
        "list every problem of a manifest and its pictures, by line",
        example="danceopd data check my_data/manifest.jsonl",
    )
    check.add_argument(
        "manifest", type=Path, help="JSONL or CSV: id, task, prompt, source_image (or a list), target_image"
    )
    _add_rows(check)
    _add_bad_rows(check, "refuse")

    _add_prepare(actions)

    imported = add_command(
        actions,
        "import",
        run_import,
        "write a Hugging Face data set on disk as pictures and a manifest",
        shows_bar=True,
        example="danceopd data import my_dataset my_data",
    )
    imported.add_argument("folder", type=Path, help="written by save_to_disk")
    imported.add_argument("out", type=output_folder)
    imported.add_argument("--split", default="train", help="which of several is read (%(default)s)")
    imported.add_argument("--task", help="what every row is for; its own is then kept as raw_task")
    _add_bad_rows(imported, "skip")

    _add_world(actions)


def _add_world(actions) -> None:
    world = add_command(
        actions,
        "world",
        run_world,
        "write pictures of the picture world as PNGs with a manifest",
        example="danceopd data world my_world --size 100",
    )
    world.add_argument("folder", type=output_folder)
    world.add_argument("--size", type=int, default=1000, help="samples per capability (%(default)s)")
    world.add_argument("--seed", type=seed, default=0)
    world.add_argument("--capabilities", nargs="+", default=["t2i", "edit"])


def _add_prepare(actions) -> None:
    prepare = add_command(
        actions,
        "prepare",
        run_prepare,
        "encode a manifest's prompts and pictures once, for training a diffusers model",
        shows_bar=True,
        example="danceopd data prepare my_data/manifest.jsonl --model MODEL --cache my_cache",
    )
    prepare.add_argument("manifest", type=Path)
    prepare.add_argument("--model", type=Path, required=True, help="a diffusers pipeline's folder: its encoders")
    prepare.add_argument(
        "--cache", type=output_folder, required=True, help="folder of encodings; manifests may share it"
    )
    prepare.add_argument("--resolution", type=int, help="pictures of its square in pixels (1024; the miniature: 64)")
    prepare.add_argument(
        "--max-sequence-length", type=int, metavar="N", help="tokens of a prompt, padding included (the pipeline's own)"
    )
    texts = (
        "also encode these, which sources are asked with: negative prompts, and texts with a row's columns in braces, "
    )
    prepare.add_argument("--texts", nargs="+", default=(), metavar="TEXT", help=texts + "such as '{prompt}, in ink'")
    _add_rows(prepare)
    prepare.add_argument("--batch-size", type=int, default=8)
    prepare.add_argument("--workers", type=int, default=4, help="threads that read pictures (%(default)s)")
    add_device(prepare)
    _add_bad_rows(prepare, "skip")


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="the folder of the pictures (the manifest's own without)")
    parser.add_argument("--needs-source", nargs="*", default=(), metavar="TASK", help="tasks that must have sources")


def _add_bad_rows(parser: argparse.ArgumentParser, default: str) -> None:
    help = "leave bad rows out and list them, or refuse them all (%(default)s)"
    parser.add_argument("--on-bad-row", choices=ON_BAD_ROW, default=default, help=help)
    parser.add_argument("--max-bad-rows", type=int, metavar="N", help="with skip: refuse more than so many")


def _say_left_out(file: Path, problems: list[Problem], listed: Path | None) -> None:
    """Prints the first rows that were left out, how many there are, and where all of them are listed."""
    for line in shown(problems):
        print(f"left out: {line}")
    if problems:
        print(f"{len({problem.line for problem in problems})} rows of {file} are left out, listed in {listed}")


def run_check(args: argparse.Namespace) -> int:
    """Prints every problem of a manifest; returns 1 where there is one, or with skip where too many rows are bad."""
    from danceopd.data.bad_rows import BadRows
    from danceopd.data.column_names import column_notes
    from danceopd.data.manifest import read_manifest

    rows, problems = read_manifest(args.manifest, args.root, needs_source=tuple(args.needs_source), decode=True)
    for problem in problems:
        print(problem)
    for note in column_notes(rows):
        print(f"warning: {note}")
    bad = len({problem.line for problem in problems})
    found = f"{len(problems)} problems in {bad} of {bad + len(rows)} rows" if problems else "no problems"
    print(f"{args.manifest}: {found}")
    try:
        BadRows(args.on_bad_row, args.max_bad_rows).settle(args.manifest, problems, len(rows))
    except UserError:
        return 1  # all of it was printed
    return 0


def run_prepare(args: argparse.Namespace) -> None:
    """Encodes a manifest's prompts and pictures."""
    import torch

    from danceopd.data.prepare import prepare
    from danceopd.support.devices import find_device

    fill_sizes(args, args.model)
    if min(args.resolution, args.batch_size, args.workers) < 1:
        raise UserError("--resolution, --batch-size and --workers must be positive")
    done = prepare(
        args.manifest,
        args.model,
        args.cache,
        resolution=args.resolution,
        root=args.root,
        needs_source=args.needs_source,
        batch_size=args.batch_size,
        workers=args.workers,
        device=str(find_device(args.device)),
        dtype=getattr(torch, args.dtype),
        on_bad_row=args.on_bad_row,
        max_bad_rows=args.max_bad_rows,
        max_sequence_length=args.max_sequence_length,
        texts=args.texts,
    )
    _say_left_out(args.manifest, done.problems, done.listed)
    for note in done.notes:
        print(f"warning: {note}")
    if done.damaged:
        print(f"mended: {len(done.damaged)} damaged shards, {', '.join(done.damaged[:3])}")
    print(f"{many(done.rows, 'row')} in {done.path}: {many(done.made, 'entry', 'entries')} encoded, {done.found} found")


def run_import(args: argparse.Namespace) -> None:
    """Writes a data set as pictures and a manifest."""
    from danceopd.data.huggingface import import_dataset

    done = import_dataset(args.folder, args.out, args.split, args.task, args.on_bad_row, args.max_bad_rows)
    _say_left_out(args.folder, done.problems, done.listed)
    if done.passed_over:
        print(f"warning: pictures of {', '.join(done.passed_over)} are left out: the manifest has no column for them")
    print(f"read {', '.join(f'{column} from {name}' for column, name in done.columns.items())}")
    print(f"{many(done.rows, 'row')}: {done.path}")


def run_world(args: argparse.Namespace) -> None:
    """Writes the picture world as pictures and a manifest."""
    from danceopd.world.data import write_world

    print(f"wrote {write_world(args.folder, args.capabilities, args.size, args.seed)}")
