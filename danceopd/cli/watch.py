"""`danceopd watch`: a page of runs on this machine."""

import argparse
from pathlib import Path

from danceopd.cli.arguments import add_command, whole
from danceopd.support.errors import UserError


def add_watch(commands) -> None:
    """Adds `danceopd watch`."""
    parser = add_command(
        commands,
        "watch",
        run_watch,
        "show runs on a page of this machine, while they train and after",
        example="danceopd watch runs/demo runs/short",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run, or a folder that holds several"
    )
    parser.add_argument(
        "--port", type=whole(0, 65535), default=8642, help="the page's port; 0 takes a free one (default: %(default)s)"
    )


def run_watch(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
    from danceopd.watch.runs import Runs
    from danceopd.watch.server import serve

    try:
        serve(
            Runs(args.runs), args.port, lambda address: print(f"watch it at {address}  (Ctrl-C ends this)", flush=True)
        )
    except OSError as error:
        raise UserError(f"port {args.port} cannot be used ({error.strerror}); give another --port, or 0") from None
