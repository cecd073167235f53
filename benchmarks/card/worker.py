"""The process that runs the parts: reads a part's name a line, and answers a row a line."""

import gc
import json
import os
import time
import traceback
from pathlib import Path

from benchmarks import common
from benchmarks.card import parts
from benchmarks.card.runner import DONE, FAILED, STOPPED


class OutOfTime(Exception):
    """A part's time is up."""


class Report:
    """What a part has at hand: its time, a place to say rows, and a folder for files."""

    def __init__(self, seconds: float, out: Path, answer: int):
        self.out, self._answer, self._until = out, answer, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that the part may still take."""
        return self._until - time.monotonic()

    def need(self, seconds: float = 0.0) -> None:
        """Raise OutOfTime unless so many seconds are left."""
        if self.left() <= seconds:
            raise OutOfTime

    def say(self, name: str, value: float | None = None, unit: str = "", **more) -> None:
        """One row; more: least (in the same unit), ok, note, main (in the summary), and figures of its own."""
        row = {"name": name, "value": value, "unit": unit} | more
        if value is not None and more.get("least"):
            row["over_least"] = value / more["least"]
        os.write(self._answer, (json.dumps(row) + "\n").encode())


def work(command: int, answer: int) -> int:
    """Run parts until the pipe is closed, or the card's context is broken."""
    os.write(answer, b'{"ready": true}\n')
    with os.fdopen(command, encoding="utf-8") as commands:
        for line in commands:
            told, ended = json.loads(line), {"ended": DONE}
            report = Report(told["seconds"], Path(told["out"]), answer)
            try:
                getattr(parts, told["part"])(report)
            except OutOfTime:
                ended = {"ended": STOPPED}
            except Exception:  # whatever it is: the other parts run all the same
                ended = {"ended": FAILED, "error": traceback.format_exc(limit=-6)}
                traceback.print_exc()
            ended["healthy"] = _clean()
            os.write(answer, (json.dumps(ended) + "\n").encode())
            if not ended["healthy"]:
                return 1
    return 0


def _clean() -> bool:
    """Give memory back; whether the card still answers."""
    gc.collect()
    try:
        common.synchronize()
        if common.on_card():
            common.cards().empty_cache()
    except RuntimeError:
        return False
    return True
