"""`danceopd data`: checks, prepares, imports and writes training data."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import (
    add_command,
    add_device,
    add_max_sequence_length,
    add_resolution,
    fill_sizes,
    output_folder,
    seed,
    whole,
)
from danceopd.data.bad_rows import ON_BAD_ROW, Problem, shown
from danceopd.support.errors import UserError
from danceopd.support.texts import many

MANIFEST = "a JSONL or CSV file with the columns id, task, prompt, source_image (a path or a list) and target_image"


def add_data(commands) -> None:
    """Adds `danceopd data` with its actions."""
    what = "check, encode, import or write training data"
    parser = commands.add_parser("data", help=what, description=f"{what[0].upper()}{what[1:]}.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", help="what is done:")

    check = add_command(
        actions,
        "check",
        run_check,
        "list every problem of a manifest and its pictures, by line",
        example="danceopd data check my_data/manifest.jsonl",
    )
    check.add_argument("manifest", type=Path, help=MANIFEST)
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
    imported.add_argument("folder", type=Path, help="the data set, as the library datasets writes it with save_to_disk")
    imported.add_argument("out", type=output_folder, help="the folder to write the pictures and the manifest into")
    imported.add_argument("--split", default="train", help="the split that is read, of several (default: %(default)s)")
    imported.add_argument(
        "--task", help="the task of every row; what the data set's own column says is kept as raw_task"
    )
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
    world.add_argument("folder", type=output_folder, help="the folder to write the pictures and the manifest into")
    world.add_argument(
        "--size", type=whole(1), default=1000, metavar="N", help="rows of each capability (default: %(default)s)"
    )
    world.add_argument("--seed", type=seed, default=0, help="seed of prompts and pictures (default: %(default)s)")
    world.add_argument(
        "--capabilities",
        nargs="+",
        default=["t2i", "edit"],
        metavar="NAME",
        help="what the rows are for (default: t2i edit)",
    )


def _add_prepare(actions) -> None:
    prepare = add_command(
        actions,
        "prepare",
        run_prepare,
        "encode a manifest's prompts and pictures once, for training a diffusers model",
        shows_bar=True,
        example="danceopd data prepare my_data/manifest.jsonl --model MODEL --cache my_cache",
    )
    prepare.add_argument("manifest", type=Path, help=MANIFEST)
    prepare.add_argument(
        "--model",
        type=Path,
        required=True,
        help="the diffusers pipeline whose encoders are used: a folder, an id of the hub, or miniature",
    )
    prepare.add_argument(
        "--cache",
        type=output_folder,
        required=True,
        metavar="FOLDER",
        help="the folder to write the encodings into; several manifests may share it",
    )
    add_resolution(prepare, "1024, of the miniature 64")
    add_max_sequence_length(prepare)
    prepare.add_argument(
        "--texts",
        nargs="+",
        default=(),
        metavar="TEXT",
        help="other texts that sources are asked with, to be encoded too: negative prompts, and texts with a row's "
        "columns in braces, such as '{prompt}, in ink'",
    )
    _add_rows(prepare)
    prepare.add_argument(
        "--batch-size",
        type=whole(1),
        default=8,
        metavar="N",
        help="prompts or pictures encoded at a time (default: %(default)s)",
    )
    prepare.add_argument(
        "--workers", type=whole(1), default=4, metavar="N", help="threads that read pictures (default: %(default)s)"
    )
    add_device(prepare)
    _add_bad_rows(prepare, "skip")


def _add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, metavar="FOLDER", help="where the manifest's paths start from (default: its own folder)"
    )
    parser.add_argument(
        "--needs-source", nargs="*", default=(), metavar="TASK", help="tasks whose rows must have a source picture"
    )


def _add_bad_rows(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--on-bad-row",
        choices=ON_BAD_ROW,
        default=default,
        help="skip leaves bad rows out and lists them, refuse ends where there is one (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-rows",
        type=whole(0),
        metavar="N",
        help="with skip, end where there are more bad rows (default: any number)",
    )


def _say_left_out(file: Path, problems: list[Problem], listed: Path | None) -> None:
    """Prints the first rows that were left out, how many there are, and where all of them are listed."""
    for line in shown(problems):
        print(f"left out: {line}")
    if problems:
        left_out = many(len({problem.line for problem in problems}), "row")
        print(f"left out {left_out} of {file}, listed in {listed}")


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
    found = (
        f"{many(len(problems), 'problem')} in {bad} of {many(bad + len(rows), 'row')}" if problems else "no problems"
    )
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
        print(f"mended: {many(len(done.damaged), 'damaged shard')}, {', '.join(done.damaged[:3])}")
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
