"""Writes and reads the log of a run."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


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
    unreadable: int = 0  # lines lost, other than the last


def read_log(path: Path) -> Log:
    """Reads log.jsonl; an absent file is an empty log.

    A last line cut off by a killed process is left out. A run that was resumed writes some updates again: what came
    before of the same kind from that update on is dropped.
    """
    kinds: dict[str, list[dict]] = {"loss": [], "evaluation": [], "health": [], "warning": []}
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    unreadable = 0
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(step, bool) or not isinstance(step, int | float) or not math.isfinite(step):
            unreadable += i < len(lines) - 1
            continue
        for kind in kinds.keys() & record.keys():
            if kind != "warning":
                while kinds[kind] and kinds[kind][-1]["step"] >= record["step"]:
                    kinds[kind].pop()
            kinds[kind].append(record)
    return Log(kinds["loss"], kinds["evaluation"], kinds["health"], kinds["warning"], unreadable)


class RunLog:
    """Appends records to log.jsonl and their numbers to TensorBoard.

    On resuming, later records of the interrupted run are dropped, so that no update stands twice.

    Args:
        folder: The run's.
        step: The update that the run goes on from.
        silent: Whether nothing is written, as by all ranks but one.
    """

    def __init__(self, folder: Path, step: int, silent: bool = False):
        self.silent = silent
        if silent:
            return
        path = folder / "log.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step] if step else []
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, record: dict) -> None:
        """Adds one record; numbers in it, nested or not, go to TensorBoard under their keys."""
        if self.silent:
            return
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()
        for key, value in _flat(record):
            self.board.add_scalar(key, value, step)

    def close(self) -> None:
        """Closes the files."""
        if not self.silent:
            self.file.close()
            self.board.close()


def _whole_lines(path: Path) -> list[str]:
    """Reads the lines of a log that are whole; a killed run may leave half of one."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            lines += [line] if "step" in json.loads(line) else []
        except json.JSONDecodeError:
            continue
    return lines


def _flat(record: dict, prefix: str = ""):
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
