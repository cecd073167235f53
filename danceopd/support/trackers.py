"""Sends a run's numbers to Weights & Biases or trackio, which share an interface."""

import importlib
import importlib.util
import secrets
from collections.abc import Sequence
from pathlib import Path

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic

TRACKERS = ("wandb", "trackio")


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError if one of the trackers is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install 'danceopd[trackers]', or leave it out")


class Tracker:
    """Writes to one tracker, in the project "danceopd", under the name of the run's folder and an id.

    The id lies in the folder, so that a resumed run goes on where it was.

    Args:
        name: One of TRACKERS.
        folder: The run's.
        config: The run's configuration, as plain values.

    Raises:
        UserError: The tracker does not start, as where no key and no terminal is at hand.
    """

    def __init__(self, name: str, folder: Path, config: dict):
        path = folder / "tracker_id"
        if not path.exists():
            write_atomic(path, secrets.token_hex(4).encode())
        run, options = f"{folder.name}-{path.read_text()}", {}
        if name == "wandb":  # the other keeps its files where TRACKIO_DIR says
            options = {"id": run, "dir": str(folder)}
        try:
            module = importlib.import_module(name)
            self.run = module.init(project="danceopd", name=run, config=config, resume="allow", **options)
        except Exception as error:  # each has errors of its own
            offline = " (WANDB_MODE=offline keeps it on this machine)" if name == "wandb" else ""
            raise UserError(f"training.trackers: {name} does not start: {error}{offline}") from error

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Sends numbers of one update."""
        self.run.log(numbers, step=step)

    def close(self) -> None:
        """Sends what is left, and ends."""
        self.run.finish()
