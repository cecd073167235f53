"""Tries to break the product: `python tests/torture`, or `make torture`.

It damages thousands of files, ends runs at random moments, and loads more than anybody has; what breaks is printed, and
the figures go to docs/reliability.md where all of it was run (--write).
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
for path in (HERE, ROOT / "tests" / "making", ROOT / "tests" / "backbones", ROOT / "kernels", ROOT):
    sys.path.insert(0, str(path))

# A worker hangs that says nothing, beside what its imports take, for so many seconds of its processor, or in all.
STILL, LONG = 30, 600

BEGIN, END = "<!-- torture: begin -->", "<!-- torture: end -->"


@dataclass
class Damage:
    """What came of a target's mutations."""

    name: str
    tried: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    memory: int = 0
    wrong: list[str] = field(default_factory=list)


def damage(name: str, count: int, first: int, folder: Path, until: float) -> Damage:
    """Gives a target its damaged files, in worker processes: where one dies, the next goes on behind its input."""
    found, began, number, end = Damage(name), time.monotonic(), first, first + count
    while number < end and time.monotonic() < until:
        command = [sys.executable, str(HERE / "worker.py"), name, str(number), str(end - number), str(folder)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        (folder / "at").unlink(missing_ok=True)
        with open(folder / "said", "w+") as said, open(folder / "errors", "w+") as errors:
            process = subprocess.Popen(command, stdout=said, stderr=errors, env=environment)
            trouble = _watched(process, folder, until)
            said.seek(0)
            errors.seek(0)
            lines, last = [json.loads(line) for line in said if line.endswith("\n")], errors.read()[-300:]
        found.tried += len(lines)
        found.slowest = max([found.slowest, *(line["seconds"] for line in lines)])
        found.memory = max([found.memory, *(line["memory"] for line in lines)])
        found.wrong += [
            f"{name} {line['number']} ({line['file']}): {line['trouble']}" for line in lines if "trouble" in line
        ]
        number += len(lines)
        if trouble == "time":
            break
        if number < end:
            if not (folder / "at").exists():
                raise RuntimeError(f"{name}: its worker does not begin: {last}")
            found.wrong.append(f"{name} {number}: {trouble or f'the process ends with {process.returncode}: {last}'}")
            number, found.tried = number + 1, found.tried + 1
            shutil.rmtree(folder / "case")  # its damaged file is still there
            (folder / "made").unlink()
    found.seconds = time.monotonic() - began
    return found


def _watched(process: subprocess.Popen, folder: Path, until: float) -> str | None:
    """Waits for a worker; ends one that stands still or has no more time, and says which."""
    at, size, spent, watched = folder / "at", -1, 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(0.05)
        now, grown = time.monotonic(), (folder / "said").stat().st_size
        with contextlib.suppress(psutil.Error):  # it has just ended
            spent = sum(watched.cpu_times()[:2])
        if grown != size or not at.exists():
            size, moved, began = grown, now, spent
        still = now - moved > LONG or spent - began > STILL
        if still or now > until:
            process.kill()
            process.wait()
            return "hangs, where no signal of Python's reaches it" if still else "time"
    return None


def table(rows: list[list[str]]) -> str:
    """Writes rows as a table in Markdown, the first as its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> int:
    """Runs the parts that are asked for; returns 1 where anything broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000, help="damaged files, of all kinds together")
    parser.add_argument("--first", type=int, default=0, help="number of the first, of each kind: others than before")
    parser.add_argument("--only", nargs="*", help="kinds of files")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--faults", type=int, default=4, help="full disks, read-only folders, signals, of each")
    parser.add_argument("--load", type=float, default=1.0, help="share of the sizes of what is loaded; 0 leaves it out")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--write", action="store_true", help="write the figures to docs/reliability.md")
    args = parser.parse_args()
    from targets import TARGETS

    until, began, wrong, text = time.monotonic() + 60 * args.minutes, time.monotonic(), [], []
    names = args.only if args.only is not None else list(TARGETS)
    shares = sum(TARGETS[name].share for name in names) or 1
    with tempfile.TemporaryDirectory() as place:
        rows = [["damaged", "inputs", "broke", "seconds", "slowest, s", "most memory, MiB"]]
        for name in names if args.mutations else ():
            folder = Path(place) / name.replace(" ", "-")
            folder.mkdir()
            count = round(args.mutations * TARGETS[name].share / shares)
            found = damage(name, count, args.first, folder, until)
            rows.append([name, str(found.tried), str(len(found.wrong)), f"{found.seconds:.0f}", f"{found.slowest:.1f}",
                         f"{found.memory / 2**20:.0f}"])  # fmt: skip
            print("  ".join(rows[-1]), *found.wrong, sep="\n", flush=True)
            wrong += found.wrong
        text += [table(rows)] if len(rows) > 1 else []
        if args.kills or args.faults:
            from kills import ends

            tried, broke = ends(Path(place) / "runs", args.kills, args.faults)
            wrong += broke
            rows = [["runs that were ended, and went on", "number"], *([kind, str(n)] for kind, n in tried.items())]
            said = "broke: ended with no message, or went on to another student or log, or left something behind."
            text.append(f"{table(rows)}\n\n{len(broke)} {said}")
            print(text[-1], flush=True)
        if args.load:
            from load import loads, sources

            rows, broke = loads(Path(place) / "load", args.load)
            wrong += broke
            text += [table(rows), table(sources(Path(place) / "sources", round(64 * args.load)))]
            print(*text[-2:], sep="\n\n", flush=True)
    print(f"{len(wrong)} broke, in {(time.monotonic() - began) / 60:.0f} minutes", *wrong, sep="\n")
    if args.write:
        words = " ".join(["python tests/torture", *(word for word in sys.argv[1:] if word != "--write")])
        page = ROOT / "docs" / "reliability.md"
        before, _, rest = page.read_text().partition(BEGIN)
        made = f"`{words}`, {time.strftime('%Y-%m-%d')}, {(time.monotonic() - began) / 60:.0f} minutes:"
        page.write_text("\n\n".join([before + BEGIN, made, *text, END + rest.partition(END)[2]]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
