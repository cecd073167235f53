"""Writes the memory table of docs/models.md by the dry run's estimate: python docs/make_memory.py, or make docs.

The networks are of the published sizes, which the tests know; nothing is loaded but what says how large they are.
"""

import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "making"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "backbones"))

from real_models import CONFIGS, MODELS, model_of, overrides, real_place

from danceopd.config.reading import load_config
from danceopd.config.sections import Config
from danceopd.planning.dry_run import dry_run
from danceopd.planning.models import examine
from danceopd.support.memory import GIB

PAGE = Path(__file__).with_name("models.md")
TABLE = re.compile(r"(?<=<!-- memory -->\n).*(?=<!-- end of memory -->)", re.DOTALL)
HEAD = ["configuration", "transformer", "trained", "card", "weights", "student and optimizer", "the rest", "whole"]
TRAINED = ("student", "gradient", "optimizer state", "average (EMA)")  # of the estimate's parts


def configurations() -> list[Path]:
    """Lists the configurations of settings A and C whose networks' sizes are known."""
    return [path for path in sorted(CONFIGS.glob("*-[ac]*.yaml")) if MODELS[model_of(path)][1] is not None]


def loaded(config: Path, root: Path) -> Config:
    """Loads a configuration for a network's folder, with one of 8 cards' part of the batch."""
    return load_config(config, [*overrides(config, root), *([] if is_small(config) else ["training.batch_size=4"])])


def is_small(config: Path) -> bool:
    """Tells whether a configuration is for one card of 24 GB."""
    return "24gb" in config.stem


def row(config: Path, plan) -> str:
    """Writes a configuration's line from its dry run."""
    parts = {key: value for key, (value, _) in plan.memory.items()}
    weights = sum(value for key, value in parts.items() if "weights" in key or key.startswith("sources"))
    trained = sum(parts.get(key, 0) for key in TRAINED)
    sizes = [plan.parameters["base"] / 1e9, plan.parameters["student, trainable"] / 1e6]
    memory = [weights, trained, plan.total_memory() - weights - trained, plan.total_memory()]
    cells = [
        f"`{config.stem}`",
        f"{sizes[0]:.1f} B",
        f"{sizes[1]:,.0f} M",
        "24 GB" if is_small(config) else "8 x 80 GB",
    ]
    return f"| {' | '.join([*cells, *(f'{value / GIB:.1f} GiB' for value in memory)])} |\n"


def table() -> str:
    """Writes the table, which takes a minute or two."""
    lines, places = ["| " + " | ".join(HEAD) + " |\n", "| --- " * len(HEAD) + "|\n"], {}
    with tempfile.TemporaryDirectory() as folder:
        for config in configurations():
            model = model_of(config)
            if model not in places:
                places[model] = real_place(Path(folder) / model, model)
            lines.append(row(config, dry_run(loaded(config, places[model]), examine)))
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
