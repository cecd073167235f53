"""Runs the parts of the check in a process of their own, each bounded in time, and writes what they say as they say it.

The parts run one after the other in one process, the worker, so that torch starts once. One that hangs is ended with
the worker, and one that breaks the CUDA context takes the worker with it: the next part gets a new one.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The parts in the order of their worth, and how much of the budget each may take beside what others left.
PARTS = {
    "machine": 20, "kernels": 100, "update": 110, "csrc": 60, "tests": 100, "rollout": 90, "query": 40, "zero3": 40,
    "profile": 40,
}  # fmt: skip
WORKER = ["-m", "benchmarks.card"]  # what Python runs for them
GRACE = 8.0  # seconds that a part may take to end by itself
START = 240.0  # and that a process may take to import torch
DONE, STOPPED, FAILED, ENDED = "done", "stopped at its time", "failed", "ended with its process"


class Worker:
    """The process that runs parts; log: the file that it prints into."""

    def __init__(self, log: Path):
        command_in, self._command = os.pipe()
        self._answer, answer_out = os.pipe()
        arguments = [*WORKER, "--worker", str(command_in), str(answer_out)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        with log.open("a", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=file,
                stderr=subprocess.STDOUT, pass_fds=(command_in, answer_out), start_new_session=True,
            )  # fmt: skip
        os.close(command_in)
        os.close(answer_out)
        self._rest, self.gone = b"", False  # what is not yet a line; whether the process has closed its end

    def ready(self, until: float) -> None:
        """Wait until it has imported what it needs; OSError if it does not get there in time."""
        for said in self.answers(min(until, time.monotonic() + START)):
            if said.get("ready"):
                return
        raise OSError("the process that runs the parts did not start; worker.txt has what it said")

    def start(self, part: str, seconds: float, out: Path) -> None:
        """Have it run a part, that is to end within so many seconds."""
        told = {"part": part, "seconds": seconds, "out": str(out)}
        os.write(self._command, (json.dumps(told) + "\n").encode())

    def answers(self, until: float):
        """What it says, as dicts, until it says nothing more, has ended, or the time (of time.monotonic) is up."""
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                yield json.loads(line)
                continue
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._answer], [], [], left)[0]:
                return
            more = os.read(self._answer, 65536)
            if not more:
                self.gone = True
                return
            self._rest += more

    def end(self) -> None:
        """End it and what it started, and wait for that: the card is free then."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._command)
        os.close(self._answer)


def run(names: Sequence[str], budget: float, out: Path) -> dict:
    """Run parts within a budget of seconds, and write OUT/card.json and card.txt after each; returns the result."""
    out.mkdir(parents=True, exist_ok=True)
    begin, worker = time.monotonic(), None
    result = {"benchmark": "card", "budget_seconds": budget, "parts": []}
    share, left_over = budget / sum(PARTS[name] for name in names), 0.0
    try:
        for name in names:
            limit = 0.0
            try:
                if worker is None:
                    worker = Worker(out / "worker.txt")
                    worker.ready(begin + budget)
                limit = min(share * PARTS[name] + left_over, budget - GRACE - (time.monotonic() - begin))
                part, worker = _part(worker, name, limit, out)
            except OSError as error:
                part = {"part": name, "ended": ENDED, "error": str(error), "seconds": 0.0, "rows": []}
                if worker:
                    worker.end()
                worker = None
            left_over = max(0.0, limit - part["seconds"])
            result["parts"].append(part)
            result["seconds"] = time.monotonic() - begin
            _write(result, out)
            print(f"{name}: {part['ended']}, {part['seconds']:.0f} s, {len(part['rows'])} rows", flush=True)
    finally:
        if worker:
            worker.end()
    return result


def _part(worker: Worker, name: str, limit: float, out: Path) -> tuple[dict, Worker | None]:
    """One part's rows and how it ended, and the worker if it can go on."""
    begin, part = time.monotonic(), {"part": name, "ended": ENDED, "rows": []}
    if limit <= 0:
        return part | {"ended": "left out: no time is left", "seconds": 0.0}, worker
    worker.start(name, limit, out)
    healthy = False
    for answer in worker.answers(begin + limit + GRACE):
        if "ended" in answer:
            healthy = answer.pop("healthy")
            part |= answer
            break
        part["rows"].append(answer)
        if answer.get("show", True):
            print(f"  {line(answer)}", flush=True)
    else:
        if not worker.gone:
            part["ended"] = STOPPED
    if not healthy:
        worker.end()
    return part | {"seconds": time.monotonic() - begin}, worker if healthy else None


def line(row: dict, width: int = 52) -> str:
    """A row in words, the name first."""
    said = f"{row['name'][:width]:<{width}}"
    if row.get("value") is not None:
        said += f"{row['value']:>12.5g} {row['unit']:<10}"
    if row.get("over_least"):
        said += f"{row['over_least']:>8.2f} x least "
    if row.get("ok") is not None:
        said += " right" if row["ok"] else " WRONG"
    return f"{said} {row.get('note', '')}".rstrip()


def text(result: dict) -> str:
    """Everything, in words."""
    lines = []
    for part in result["parts"]:
        lines += ["", f"{part['part']}: {part['ended']}, {part['seconds']:.0f} s"]
        lines += [f"  {line(row)}" for row in part["rows"]]
        lines += [f"  {said}" for said in part.get("error", "").splitlines()]
    return "\n".join([summary(result), *lines]) + "\n"


def summary(result: dict) -> str:
    """One screen: the machine, how each part ended, what was wrong, and the main figures."""
    lines = [f"card check: {result.get('seconds', 0):.0f} of {result['budget_seconds']:.0f} s"]
    for part in result["parts"]:
        rows = part["rows"]
        judged = [row for row in rows if row.get("ok") is not None]
        wrong = [row for row in judged if not row["ok"]]
        lines.append(
            f"{part['part']:<9}{part['ended']:<22}{part['seconds']:>5.0f} s"
            + (f"  {len(judged) - len(wrong)} of {len(judged)} right" if judged else "")
        )
        lines += [
            f"  {line(row, 42)}"[:118]
            for row in [*wrong[:3], *(r for r in rows if r.get("main") and r not in wrong)][:4]
        ]
        lines += [f"  {said}"[:110] for said in part.get("error", "").splitlines()[-1:]]
    return "\n".join(lines)


def failed(result: dict) -> bool:
    """Whether something was wrong, or a part failed."""
    wrong = any(row.get("ok") is False for part in result["parts"] for row in part["rows"])
    return wrong or any(part["ended"] in (FAILED, ENDED) for part in result["parts"])


def _write(result: dict, out: Path) -> None:
    for name, said in (("card.json", json.dumps(result, indent=1) + "\n"), ("card.txt", text(result))):
        (out / f".{name}").write_text(said, encoding="utf-8")
        (out / f".{name}").replace(out / name)
