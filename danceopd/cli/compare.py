"""`danceopd compare`: runs on the same prompts and seeds, paired picture by picture."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command, output_file
from danceopd.support.errors import UserError


def add_compare(commands) -> None:
    """Adds `danceopd compare`."""
    parser = add_command(
        commands,
        "compare",
        run_compare,
        "compare runs of GenEval or GEdit-Bench, picture by picture",
        example="danceopd compare out_base out_student -o compare.html",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a folder that danceopd evaluate geneval has scored (with results.jsonl in it), or OUTPUT/METHOD or "
        "OUTPUT/scores/METHOD/JUDGE of danceopd evaluate gedit; the others are compared with the first",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=output_file(".html"),
        default="compare.html",
        metavar="FILE",
        help="the page to write (default: %(default)s)",
    )


def run_compare(args: argparse.Namespace) -> None:
    """Prints the paired differences and writes the page."""
    from danceopd.evaluation.compare import compare, distinct, paired, read_run, table, warnings_of, write_page

    if len(args.runs) < 2:
        raise UserError("give two runs or more; the first is what the others are compared to")
    runs = paired(distinct([read_run(path) for path in args.runs]))
    comparisons = [compare(runs[0], run) for run in runs[1:]]
    for warning in warnings_of(runs, comparisons):
        print(f"warning: {warning}")
    rows = table(runs, comparisons)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]))
    write_page(args.output, runs, comparisons)
    print(f"wrote {args.output}")
