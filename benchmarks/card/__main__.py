"""python -m benchmarks.card"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.card import __doc__ as about
from benchmarks.card import runner


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.card", description=about)
    parser.add_argument("--budget", type=float, default=600, metavar="SECONDS", help="for all parts (%(default)g)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where card.json and card.txt go")
    parser.add_argument(
        "--parts", nargs="+", choices=runner.PARTS, default=list(runner.PARTS), help="(%(choices)s)", metavar="PART"
    )
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        from benchmarks.card.worker import work

        return work(*args.worker)
    if not args.out:
        parser.error("--out FOLDER is needed: the results go there")
    if args.budget <= 0:
        parser.error(f"--budget: {args.budget:g} seconds are no time")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the parts' process is ended too
    result = runner.run([name for name in runner.PARTS if name in args.parts], args.budget, args.out.resolve())
    print(f"\n{runner.summary(result)}\n{args.out / 'card.txt'} has everything, card.json the same as figures")
    return 1 if runner.failed(result) else 0


if __name__ == "__main__":
    sys.exit(main())
