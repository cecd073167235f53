"""Ends runs of the picture world at random moments, by a signal, a full disk or a closed folder, and lets them go on.

A run is a process that was forked after the imports. Its audit hook counts what it does to files: at the operation that
was drawn it is killed, or is told that the disk is full, so that many of the moments lie inside a checkpoint's writing.
"""

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from world_runs import raw_run, write_networks

from danceopd.cli.parser import main
from danceopd.training.checkpoints import checkpoints, load_newest

KEEP = 2  # checkpoints that stay

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Ended:
    """How a run's process ended, and what it printed."""

    code: int
    text: str
    operations: int


def run(config: Path, folder: Path, prepare: Callable[[Path], None], kill_after: float | None = None) -> Ended:
    """Trains in a forked process.

    Args:
        config: The configuration.
        folder: Of the run.
        prepare: Is called in the process before it begins, with a file to count operations in.
        kill_after: Seconds after which the process gets SIGKILL, if it still runs.
    """
    printed, count = folder.with_suffix(".txt"), folder.with_suffix(".count")
    count.write_text("0")
    process = multiprocessing.get_context("fork").Process(target=_train, args=(config, folder, printed, count, prepare))
    process.start()
    process.join(kill_after)
    if kill_after is not None and process.is_alive():
        process.kill()
    process.join(600)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{folder}: the run has not ended after 600 s")
    return Ended(process.exitcode, printed.read_text(errors="replace"), int(count.read_text() or 0))


def _train(config: Path, folder: Path, printed: Path, count: Path, prepare: Callable[[Path], None]) -> None:
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    prepare(count)
    sys.exit(main(["train", "--config", str(config), f"training.output_dir={folder}"]))


def at_operation(folder: Path, number: int | None, act: Callable[[], None], onwards: bool = False) -> Callable:
    """Acts at the run's n-th operation on a file of its folder, or at each one from then on; counts them all."""

    def prepare(count: Path) -> None:
        done, place = [0], f"{folder}/"

        def look(event: str, args: tuple) -> None:
            if event not in OPERATIONS or not isinstance(args[0], str | os.PathLike):
                return
            if f"{os.fspath(args[0])}/".startswith(place) and (event != "open" or (args[2] or 0) & 3):
                done[0] += 1
            else:
                return
            if number is None:
                with open(count, "w") as file:
                    file.write(str(done[0]))
            elif done[0] == number or (onwards and done[0] > number):
                act()

        sys.addaudithook(look)

    return prepare


def die() -> None:
    """Ends this process as nothing else can."""
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    """Answers as a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def closed() -> None:
    """Answers as a file system that has become read-only."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def small_files(size: int) -> Callable:
    """Lets no file grow over so many bytes, so that a write fails in its middle."""

    def prepare(count: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return prepare


def backwards(count: Path) -> None:
    """Lets the clock go back an hour each time that it is read."""
    hours = [0]

    def now() -> float:
        hours[0] += 1
        return 1.7e9 - 3600 * hours[0]

    time.time = now


def terminated(seconds: float) -> Callable:
    """Sends this process SIGTERM after so many seconds."""

    def prepare(count: Path) -> None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return prepare


def nothing(count: Path) -> None:
    """Lets a run be."""


def same(whole: Path, folder: Path) -> str | None:
    """Compares a run that was ended and went on with one that was not, bit by bit; says where they differ."""
    (one, said), (two, _) = load_newest(whole / "checkpoints"), load_newest(folder / "checkpoints")
    if one.step != two.step or said:
        return f"it ends at step {two.step} and not at {one.step}"
    for name in one.shapes:
        if not torch.equal(one.tensor(name), two.tensor(name)):
            return f"{name} differs"
    ours, theirs = load_file(whole / "student.safetensors"), load_file(folder / "student.safetensors")
    if any(not torch.equal(value, theirs[name]) for name, value in ours.items()):
        return "student.safetensors differs"
    records = [_losses(path / "log.jsonl") for path in (whole, folder)]
    if records[0] != records[1]:
        return "the log's losses differ"
    there = len(checkpoints(folder / "checkpoints"))
    if there > KEEP:
        return f"{there} checkpoints stay, and not {KEEP}"
    left = [str(path.relative_to(folder)) for path in folder.rglob(".*")]
    return f"{left[0]} is left" if left else None


def _losses(path: Path) -> list[tuple]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def ends(folder: Path, kills: int, faults: int, steps: int = 8) -> tuple[dict[str, int], list[str]]:
    """Ends runs at random moments, lets each go on, and compares it with one that was let be.

    Args:
        folder: Is written into.
        kills: Number of SIGKILLs.
        faults: Number of each other kind of end.
        steps: Updates of a run.

    Returns:
        How often each kind of end was tried, and what went wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_networks(folder)
    raw = raw_run(folder)
    raw["training"] |= {"max_steps": steps, "save_every": 2, "sample_every": 0, "keep_checkpoints": KEEP}
    raw["evaluation"]["times"] = 0
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    whole, began = folder / "whole", time.monotonic()
    ended = run(config, whole, at_operation(whole, None, nothing))
    if ended.code or not ended.operations:
        raise RuntimeError(f"the run that nothing ends: {ended}")
    seconds, dice, wrong = time.monotonic() - began, random.Random(0), []
    tried = dict.fromkeys(("killed at an operation", "killed at a time", "disk full", "write cut off", "read-only",
                           "terminated", "clock goes back"), 0)  # fmt: skip

    def attempt(kind: str, prepare: Callable[[Path], Callable], codes: set[int], after: float | None = None) -> None:
        place = folder / f"{kind.replace(' ', '-')}-{tried[kind]}"
        tried[kind] += 1
        first = run(config, place, prepare(place), after)
        if first.code not in codes:
            wrong.append(f"{place.name}: ends with {first.code}: {first.text[-300:]}")
        if "Traceback" in first.text:
            wrong.append(f"{place.name}: a traceback: {first.text[-600:]}")
        second = run(config, place, nothing)
        if second.code:
            wrong.append(f"{place.name}: does not go on ({second.code}): {second.text[-300:]}")
        elif trouble := same(whole, place):
            wrong.append(f"{place.name}: {trouble}")

    for i in range(kills):
        at = dice.randrange(1, ended.operations + 1)
        if i % 3 < 2:
            attempt("killed at an operation", lambda place, at=at: at_operation(place, at, die), {-signal.SIGKILL})
        else:
            attempt("killed at a time", lambda place: nothing, {-signal.SIGKILL, 0}, dice.uniform(0, seconds))
    for _ in range(faults):
        at, size = dice.randrange(1, ended.operations + 1), dice.choice((1, 500, 5_000, 50_000, 200_000))
        attempt("disk full", lambda place, at=at: at_operation(place, at, full, onwards=True), {0, 2})
        attempt("write cut off", lambda place, size=size: small_files(size), {0, 2})
        attempt("read-only", lambda place, at=at: at_operation(place, at, closed, onwards=True), {0, 2})
        attempt("terminated", lambda place: terminated(dice.uniform(0, seconds)), {0, 143, -signal.SIGTERM})
        attempt("clock goes back", lambda place: backwards, {0})
    return tried, wrong
