"""The card check on the pretend card: python tests/pretend_card/card_check.py --out FOLDER, and its other options.

What it shows is that every part runs on a device that is no CPU and captures graphs; its times are of the host.
"""

import sys
from pathlib import Path

import torch
from pretend_card import NAME, ROOT, pretend_card

if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from benchmarks import common
    from benchmarks.card import runner
    from benchmarks.card.__main__ import main

    common.device = lambda: torch.device(NAME)
    runner.WORKER = [str(Path(__file__).resolve())]  # the process that runs the parts has the pretend card too
    with pretend_card():
        sys.exit(main())
