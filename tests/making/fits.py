"""Works out which cards each model's LoRA run fits, by the dry run's estimate at the released sizes.

    python tests/making/fits.py docs/fits.json     # then python docs/make_models.py

One sample of 1024 x 1024 at a time, with gradient checkpointing in bf16, sources of rank 128, AdamW in float32.
"""

import json
import sys
import tempfile
from pathlib import Path

from real_models import CONFIGS, overrides, real_place
from released import MODELS

from danceopd.config.reading import load_config
from danceopd.planning.dry_run import dry_run
from danceopd.planning.largest import OF_ADAPTER, largest
from danceopd.planning.memory import LEFT
from danceopd.planning.models import examine
from danceopd.planning.swapping import spared
from danceopd.support.memory import GIB

CARDS = {24: 23.5, 48: 44, 80: 79}  # GiB that a process can have, by the GB of a card's name
RANKS = (16, 128)


def fits(root: Path, model: str) -> dict:
    """What a model's run takes by rank, and how many of its blocks wait on each card."""
    path = next(p for s in ("c", "a") if (p := CONFIGS / f"{model}-{s}.yaml").exists())
    real_place(root, model)
    changes = ["training.batch_size=4", "training.swap_blocks=3"]
    config = load_config(path, [*overrides(path, root), *changes])
    found = dry_run(config, examine)
    assert not found.problems, found.problems
    total, there = found.total_memory() + found.swap.spared, len(found.blocks)
    adapter = sum(found.memory[name][0] for name in OF_ADAPTER if name in found.memory)
    row = {"model": model, "blocks": there, "of": path.stem, "ranks": {}}
    for rank in RANKS:
        whole = total - adapter * (1 - rank / config.student.lora.rank)
        counts = [0, *range(3, there + 1)]
        waits = {
            gb: next((n for n in counts if whole - spared(found, n) + LEFT <= size * GIB), None)
            for gb, size in CARDS.items()
        }
        row["ranks"][rank] = {"gib": round(whole / GIB, 1), "waits": waits}
    row["samples_80"] = largest(config, found, CARDS[80] * GIB - found.swap.spared).samples
    return row


def main(out: Path) -> None:
    """Writes a row for each model, as each is done."""
    rows = json.loads(out.read_text()) if out.exists() else []
    for model in MODELS:
        if MODELS[model][1] is None or any(row["model"] == model for row in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(fits(Path(folder), model))
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
