"""Benchmarks one after the other, each in a process of its own, into one folder.

    python -m benchmarks.run --suite all --output results            # every benchmark
    python -m benchmarks.run --suite quick --output results          # the same at small sizes
    python -m benchmarks.run --suite rollout train --output results  # some of them

Of each, FOLDER gets NAME.json, NAME.png and NAME.txt with what it printed; README.md there has all tables. One that
fails is said at the end, with the exit status 1, and the others run all the same.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common

ROOT = Path(__file__).parents[1]
# Each name has its module, the arguments of "all" and those of "quick".
SUITE = {
    "rollout": (
        "rollout_bench",
        ["--full"],
        ["--rounds", "3", "--batch", "16", "--variants", "full", "depth", "depth+static"],
    ),
    "rollout-guided": (
        "rollout_bench",
        ["--full", "--model", "sd3", "--batch", "4", "8", "--guidance", "1", "4.5"],
        ["--model", "sd3", "--resolution", "32", "--batch", "2", "--guidance", "4.5", "--variants", "full", "depth"],
    ),
    "rollout-overhead": ("rollout_bench", ["--overhead", "--full"], ["--overhead", "--rounds", "2"]),
    "query": ("query_bench", ["--full"], ["--teachers", "4", "--rounds", "3"]),
    "train-world": ("train_bench", ["--world"], ["--world", "--rounds", "1", "--batch-size", "8"]),
    "train": ("train_bench", [], ["--only-ratio", "--rounds", "1", "--batch-size", "2"]),
    "stream": ("stream_bench", [], ["--rounds", "1"]),
    "kernels": ("kernel_bench", ["--full"], ["--shape", "4", "16", "32", "32", "--dtypes", "float32"]),
    "zero3": ("zero3_bench", [], ["--rounds", "1", "--width", "128", "--depth", "2"]),
}


def run(name: str, quick: bool, output: Path) -> tuple[str, float]:
    """(what went wrong or "", seconds) of one benchmark; all that it prints is shown and kept."""
    module, *options = SUITE[name]
    files = ["--json", str(output / f"{name}.json"), "--plot", str(output / f"{name}.png")]
    command = [sys.executable, "-m", f"benchmarks.{module}", *options[quick], *files]
    begin, python_path = time.monotonic(), os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (output / f"{name}.txt").open("w", encoding="utf-8") as log:
        ended = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path}, stdout=log, stderr=subprocess.STDOUT
        )
    taken = time.monotonic() - begin
    return f"exit status {ended.returncode}, see {name}.txt" if ended.returncode else "", taken


def summary(names: list[str], failed: dict[str, str], output: Path) -> str:
    """Markdown: each benchmark's heading, table and plot."""
    lines = ["# Benchmarks", ""]
    for name in names:
        lines += [f"## {name}", ""]
        if name in failed:
            lines += [f"Failed: {failed[name]}", ""]
            continue
        result = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
        lines += ["```", common.heading(result), "", common.table(result["rows"]), "```", ""]
        lines += [f"![{name}]({name}.png)", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suite", nargs="+", default=["all"], choices=["all", "quick", *SUITE], metavar="NAME",
        help=f"all, quick, or some of {', '.join(SUITE)}; quick with names: these at small sizes",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures, made if it is not there")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    names = [name for name in SUITE if name in args.suite] or list(SUITE)
    failed = {}
    for name in names:
        print(f"{name} ...", end="", flush=True)
        wrong, taken = run(name, "quick" in args.suite, output)
        print(f" {wrong or 'done'}, {taken:.0f} s", flush=True)
        if wrong:
            failed[name] = wrong
    (output / "README.md").write_text(summary(names, failed, output), encoding="utf-8")
    print(f"{output / 'README.md'} has the tables")
    if failed:
        print(f"{len(failed)} of {len(names)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
