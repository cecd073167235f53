"""Reads the log of a run as it grows, and thins it out for charts."""

import json
import math
from array import array
from pathlib import Path

from danceopd.support.texts import finite

POINTS = 1200  # of a chart's line, at most

NUMBERS = (
    "loss",
    "gradient_norm",
    "learning_rate",
    "network_evaluations",
    "samples_per_second",
    "seconds",
    "peak_memory_gib",
    "tokens_per_second",
    "mfu",
)

LINES = 300  # of the log that are shown, the last

WIDTH = 1500  # characters of such a line


class Series:
    """The numbers of a log by their names, each with a value for every record; NaN where a record has none."""

    def __init__(self):
        self.steps = array("d")
        self.columns: dict[str, array] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: float, values: dict[str, float]) -> None:
        """Adds a record; what a resumed run writes again takes the place of what was there from that step on."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            for column in self.columns.values():
                column.pop()
        self.steps.append(step)
        for name in values.keys() - self.columns.keys():
            self.columns[name] = array("d", [math.nan]) * (len(self.steps) - 1)
        for name, column in self.columns.items():
            column.append(values.get(name, math.nan))

    def thinned(self, points: int = POINTS) -> dict:
        """Averages neighbours until no more than `points` are left.

        Returns:
            ``{"steps": [...], "columns": {name: [...]}}`` with None where there is no number.
        """
        size = max(1, math.ceil(len(self) / points))
        starts = range(0, len(self), size)
        return {
            "steps": [self.steps[min(start + size, len(self)) - 1] for start in starts],
            "columns": {
                name: [_mean(column[start : start + size]) for start in starts] for name, column in self.columns.items()
            },
        }


def _mean(values: array) -> float | None:
    there = [value for value in values if math.isfinite(value)]
    return float(f"{sum(there) / len(there):.6g}") if there else None


class RunLogReader:
    """What log.jsonl holds so far; `poll` reads only what is new.

    Args:
        path: The log, which need not be there.

    Attributes:
        training, evaluations: The records of updates, and the scores.
        health: The last record of norms and queries.
        warnings: (step, text) of each.
        tail: The last lines as they are.
        unreadable: Number of lines that are no records.
        version: Another number whenever something was read.
    """

    def __init__(self, path: Path):
        self.path, self.version = path, 0
        self._begin(None)

    def _begin(self, file: tuple | None) -> None:
        self._file, self._offset, self._rest = file, 0, b""
        self.training, self.evaluations, self.health = Series(), Series(), {}
        self.warnings: list[tuple[float, str]] = []
        self.tail: list[str] = []
        self.unreadable, self.changed = 0, 0.0

    def poll(self) -> None:
        """Reads what was written since the last call; begins anew where the file is another or shorter."""
        try:
            stat = self.path.stat()
        except OSError:
            if self._file:
                self._begin(None)
                self.version += 1
            return
        file = (stat.st_dev, stat.st_ino)
        if file != self._file or stat.st_size < self._offset:
            self._begin(file)
        if stat.st_size == self._offset:
            return
        with open(self.path, "rb") as opened:
            opened.seek(self._offset)
            data = opened.read(stat.st_size - self._offset)
        self._offset += len(data)
        self.changed, self.version = stat.st_mtime, self.version + 1
        *lines, self._rest = (self._rest + data).split(b"\n")  # the last may not be whole yet
        for line in lines:
            if line.strip():
                self._take(line)
        new = [line[:WIDTH].decode("utf-8", "replace") for line in lines[-LINES:] if line.strip()]
        self.tail = [*self.tail, *new][-LINES:]

    def _take(self, line: bytes) -> None:
        """Takes in a line; one that is no record is counted and passed over."""
        try:
            record = json.loads(line)
            step = record["step"]
            if finite(step) is None:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            self.unreadable += 1
            return
        if "loss" in record:
            values = {name: number for name in NUMBERS if (number := finite(record.get(name))) is not None}
            losses = record.get("loss_by_capability")
            for name, loss in losses.items() if isinstance(losses, dict) else ():
                if (number := finite(loss)) is not None:
                    values[f"loss/{name}"] = number
            self.training.add(step, values)
        if isinstance(record.get("evaluation"), dict):
            numbers = {name: finite(value) for name, value in record["evaluation"].items()}
            self.evaluations.add(step, {name: number for name, number in numbers.items() if number is not None})
        if isinstance(record.get("health"), dict):
            self.health = record["health"]
        if isinstance(record.get("warning"), str):
            self.warnings.append((step, record["warning"]))
