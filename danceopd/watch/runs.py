"""What a run's folder holds for the page: its log, samples and configuration. Nothing is written there."""

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from danceopd.support.errors import UserError
from danceopd.support.paths import near_path
from danceopd.watch.series import RunLogReader

QUIET = 600.0  # seconds without a new line in its log until a run counts as stopped

LARGEST = 2**20  # bytes of a configuration that is shown

_SAMPLE = re.compile(r"step-(\d{1,12})\.png")


class WatchedRun:
    """A run that is read again whenever the page asks.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = RunLogReader(folder / "log.jsonl")
        self._lock = threading.Lock()  # requests are answered in threads
        self._last: tuple[str, dict] = ("", {})

    def samples(self) -> list[int]:
        """Lists the steps that have a grid of samples."""
        try:
            names = [path.name for path in (self.folder / "samples").iterdir()]
        except OSError:
            return []
        return sorted(int(match[1]) for match in map(_SAMPLE.fullmatch, names) if match)

    def sample(self, step: int) -> Path | None:
        """Returns the grid of a step, which lies in the run's folder; None where there is none."""
        path = self.folder / "samples" / f"step-{step:08d}.png"
        inside = path.is_file() and path.resolve().is_relative_to(self.folder.resolve())
        return path if inside else None

    def configuration(self) -> str:
        """Returns the text of config.yaml; "" where there is none."""
        try:
            with open(self.folder / "config.yaml", encoding="utf-8", errors="replace") as file:
                return file.read(LARGEST)
        except OSError:
            return ""

    def most_steps(self) -> int | None:
        """Returns training.max_steps; None where the configuration cannot be read."""
        try:
            steps = yaml.safe_load(self.configuration())["training"]["max_steps"]
        except (yaml.YAMLError, KeyError, TypeError, RecursionError):
            return None
        return steps if isinstance(steps, int) else None

    def state(self) -> dict:
        """Reads what is new and says how far the run is.

        Returns:
            ``state`` (waiting, training, stopped, finished or gone), ``step``, ``max_steps``, ``changed`` and the
            ``version`` of what was read.
        """
        with self._lock:
            return self._state()

    def _state(self) -> dict:
        self.log.poll()
        most, steps = self.most_steps(), self.log.training.steps
        step = int(steps[-1]) if steps else 0
        if not self.folder.is_dir():
            state = "gone"
        elif most and step >= most:
            state = "finished"
        elif not steps:
            state = "waiting"
        else:
            state = "training" if time.time() - self.log.changed < QUIET else "stopped"
        version = f"{self.log.version}.{len(self.samples())}.{state}"
        return {"state": state, "step": step, "max_steps": most, "changed": self.log.changed, "version": version}

    def everything(self) -> dict:
        """Returns all that the page draws of the run, as plain values."""
        with self._lock:
            state = self._state()
            if self._last[0] != state["version"]:
                drawn = {
                    "training": self.log.training.thinned(),
                    "evaluations": self.log.evaluations.thinned(),
                    "health": self.log.health,
                    "warnings": self.log.warnings[-50:],
                    "unreadable": self.log.unreadable,
                    "samples": self.samples(),
                }
                self._last = state["version"], drawn
            return {**state, **self._last[1]}

    def tail(self) -> str:
        """Returns the last lines of the log as they are."""
        with self._lock:
            self.log.poll()
            return "\n".join(self.log.tail)


class Runs:
    """The runs that were named, and those in named folders that hold several.

    Args:
        folders: Runs, or folders of runs.

    Raises:
        UserError: One of them is not there.
    """

    def __init__(self, folders: Sequence[Path]):
        for folder in folders:
            if not folder.is_dir():
                near = near_path(folder) or "; give the training.output_dir of a run, or a folder of runs"
                raise UserError(f"there is no folder {folder}{near}")
        self.folders = list(folders)
        self._known: dict[str, WatchedRun] = {}
        if not self.found():
            raise UserError(
                f"no run in {', '.join(map(str, folders))}: a run has a config.yaml or a log.jsonl; start one with "
                "danceopd train --config FILE"
            )

    def found(self) -> dict[str, WatchedRun]:
        """Looks for runs, those that were found before among them, though their folder may be gone now."""
        for folder in self.folders:
            for run in [folder] if _is_run(folder) else sorted(filter(_is_run, _folders(folder))):
                self._known.setdefault(str(run), WatchedRun(run))
        return dict(self._known)  # requests are answered in threads


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "log.jsonl").is_file()


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
