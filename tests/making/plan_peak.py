"""The most memory that two updates of a run take, beyond what is there after the imports: one process, or rank.

python tests/plan_peak.py CONFIG [DEEPSPEED] prints it in bytes, by rank 0; DEEPSPEED: its settings, as JSON.
"""

import json
import re
import sys
from pathlib import Path


def status(key: str) -> int:
    """Bytes of a line of this process's status; VmHWM is the most since its mark was last set back."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def main(path: str, settings: str | None = None) -> None:
    import deepspeed.runtime.zero.stage3  # noqa: F401
    import torch

    from danceopd.config.reading import load_config
    from danceopd.support.ranks import ALONE
    from danceopd.training.loop import Trainer
    from danceopd.training.zero.launch import begin
    from danceopd.world.build import build

    torch.set_num_threads(1)
    file = Path(settings) if settings else None
    ranks, zero = begin(file, "cpu", 300) if file else (ALONE, None)
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark back
    before = status("VmRSS")
    config = load_config(path)
    trainer = Trainer(config, build(config), ranks, zero)
    for _ in range(2):
        trainer.update()
    peaks = ranks.gather(status("VmHWM") - before)
    if ranks.rank == 0:
        print(json.dumps({"peak": max(peaks)}))
    ranks.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
