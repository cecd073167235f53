"""Runs one training in a process of its own; danceopd.reproduce.run starts it."""

import json
import sys
from pathlib import Path

from danceopd.reproduce.matrix import Run
from danceopd.reproduce.run import Folders, make_run
from danceopd.support.exits import guarded


def main(order: str) -> None:
    """Makes the run that an order, as JSON, describes."""
    values = json.loads(order)
    make_run(Run(**values["run"]), Folders(**{key: Path(path) for key, path in values["folders"].items()}))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1]))
