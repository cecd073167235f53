"""Writes and reads the log of a run."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from danceopd.support.files import write_atomic
from danceopd.support.texts import finite, parse_json
from danceopd.support.trackers import Tracker


@dataclass(frozen=True)
class Log:
    """The records of a training's log by what they hold, each list in the order of updates.

    Attributes:
        training, evaluations, health, warnings: The records.
        unreadable: Number of lines lost, other than the last.
    """

    training: list[dict]
    evaluations: list[dict]
    health: list[dict]
    warnings: list[dict]
    unreadable: int = 0


def read_log(path: Path) -> Log:
    """Reads log.jsonl; an absent file is an empty log.

    A last line cut off by a killed process is left out. A run that was resumed writes some updates again: what came
    before of the same kind from that update on is dropped.
    """
    kinds: dict[str, list[dict]] = {"loss": [], "evaluation": [], "health": [], "warning": []}
    lines = list(_lines(path))
    unreadable = 0
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        record = _record(line)
        if record is None:
            unreadable += i < len(lines) - 1
            continue
        for kind in kinds.keys() & record.keys():
            if kind != "warning":
                while kinds[kind] and kinds[kind][-1]["step"] >= record["step"]:
                    kinds[kind].pop()
            kinds[kind].append(record)
    return Log(kinds["loss"], kinds["evaluation"], kinds["health"], kinds["warning"], unreadable)


class RunLog:
    """Appends records to log.jsonl and their numbers to TensorBoard, and to trackers.

    On resuming, later records of the interrupted run are dropped, so that no update stands twice.

    Args:
        folder: The run's.
        step: The update that the run goes on from.
        silent: Whether nothing is written, as by all ranks but one.
        trackers: Names of those that get the numbers too (support.trackers).
        config: The run's configuration, which they show.
    """

    def __init__(
        self, folder: Path, step: int, silent: bool = False, trackers: Sequence[str] = (), config: dict | None = None
    ):
        self.silent = silent
        if silent:
            return
        path = folder / "log.jsonl"
        records = ((line, _record(line)) for line in (_lines(path) if step else ()))
        kept = [line for line, record in records if record is not None and record["step"] <= step]
        # Aside and then in its place: a kill or a full disk leaves the old log, and a link is not followed.
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        self.file = open(descriptor, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            (folder / "tracker_id").unlink(missing_ok=True)  # of the run that is overwritten
        self.trackers = [Tracker(name, folder, config or {}) for name in trackers]

    def write(self, step: int, record: dict) -> None:
        """Adds one record; numbers in it, nested or not, go to TensorBoard and trackers under their keys."""
        if self.silent:
            return
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()
        numbers = dict(_flat(record))
        for key, value in numbers.items():
            self.board.add_scalar(key, value, step)
        for tracker in self.trackers if numbers else ():
            tracker.log(step, numbers)

    def close(self) -> None:
        """Closes the files."""
        if not self.silent:
            self.file.close()
            self.board.close()
            for tracker in self.trackers:
                tracker.close()


def _lines(path: Path) -> Iterator[str]:
    """Yields the lines of a log, none if it is not there; bytes that are no text are replaced."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n")


# What readers of a record rely on.
NUMBERS = ("loss", "network_evaluations")
OBJECTS = ("loss_by_capability", "evaluation", "health")


def _record(line: str) -> dict | None:
    """Reads a line of a log: an object with a finite step and fields of their forms; None for any other."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or finite(record.get("step")) is None:
        return None
    if not all(isinstance(record.get(key, {}), dict) for key in OBJECTS):
        return None
    numbers = [*map(record.get, NUMBERS), *record.get("loss_by_capability", {}).values()]
    # A loss may be NaN: the line says so.
    return record if all(n is None or isinstance(n, float) or finite(n) is not None for n in numbers) else None


def _flat(record: dict, prefix: str = ""):
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
