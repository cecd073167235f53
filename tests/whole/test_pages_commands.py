"""The commands of README, of the pages for a first hour and of what comes next, run as a reader types them.

The miniature stands in for the models that they name, one process for several, and a run ends after an update or two.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from pages import ROOT, blocks
from PIL import Image

from danceopd.cli.parser import main
from danceopd.miniature.data import write_miniature
from danceopd.miniature.shipped import shipped_sources

NEXT = ("doctor", "init", "operators", "runs", "sampling")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("start-*.md")), *(ROOT / f"docs/{name}.md" for name in NEXT)]

# What a page takes as done.
DEMO = "train --config configs/demo.yaml"
OF_A_MODEL = (
    "data prepare rows.jsonl --model MODEL --cache cache",
    "train --config configs/models/qwen-image-edit-2511-a.yaml training.output_dir=runs/model",
)
BEFORE = {"runs.md": (DEMO, *OF_A_MODEL), "sampling.md": (DEMO, *OF_A_MODEL)}

STAND_IN = {"model=MODEL": "model=miniature", "500": "1", "1000": "2"}  # a run of two updates has these checkpoints
STAND_IN |= dict.fromkeys(("MODEL", "black-forest-labs/FLUX.2-klein-base-4B"), "miniature")

# What ends a command soon, and what it cannot have here: models at their paths, other optimizers' packages, a card.
MINIATURE = ["model=miniature", "student.lora.targets=all-linear"]
SMALL = ["training.max_steps=2", "training.batch_size=2", "training.gradient_accumulation_steps=1"]
SMALL += ["training.optimizer=adamw", "training.precision=fp32", "training.save_every=1"]
SOON = {
    "data prepare": ["--resolution", "64", "--max-sequence-length", "16", "--device", "cpu", "--dtype", "float32"],
    "merge-loras": ["--steps", "2", "--resolution", "64", "--max-sequence-length", "16", "training.batch_size=4"],
    "train configs/models": [*SMALL, *MINIATURE, "training.sample_every=0"],
    "plan": MINIATURE,
    "init my_loras": ["--base", "miniature"],  # which no file there names
    "train configs/demo.yaml": ["training.max_steps=2", "evaluation.quick=1", "evaluation.per_task=1"],
}

ELSEWHERE = ("evaluate gedit", "reproduce", "watch")  # a judge's address, minutes, until Ctrl-C: their own tests'


def commands(page: Path) -> list[list[str]]:
    """The words of each `danceopd` command of a page, those of more than one line as one."""
    code = "\n".join(blocks(page, "", "bash")).replace("\\\n", " ")
    code = re.sub(r"deepspeed --num_gpus \d train.py(.*?)( --deepspeed \S+)?$", r"danceopd train\1", code, flags=re.M)
    return [shlex.split(line, comments=True)[1:] for line in code.splitlines() if line.strip().startswith("danceopd ")]


def typed(words: list[str]) -> list[str]:
    """A command as it is run here."""
    words = [STAND_IN.get(word, word) for word in words]
    config = next((word for word in words if word.startswith("configs/")), "")
    names = (" ".join(words[:2]), words[0], f"{words[0]} {config}", f"{words[0]} {Path(config).parent}")
    return words + [more for name, added in SOON.items() if name in names for more in added]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the pages take as there: configurations, LoRAs and a manifest."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "loras").mkdir()
    sources = shipped_sources()
    for name, path in {"loras/t2i": "t2i", "loras/edit": "edit", "ink": "night", "oil": "wood"}.items():
        shutil.copy(sources[path], tmp_path / f"{name}.safetensors")
    write_miniature(tmp_path, ["t2i", "edit"], 4, 0).rename(tmp_path / "rows.jsonl")
    (tmp_path / "my_loras").mkdir()
    for name in ("ink", "oil"):
        shutil.copy(tmp_path / f"{name}.safetensors", tmp_path / "my_loras")
    for name in ("picture", "room"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_do_what_it_says(page, desk, capsys):
    before = [shlex.split(line) for line in BEFORE.get(page.name, ())]
    for words in [*before, *commands(page)]:
        if " ".join(words).startswith(ELSEWHERE):
            continue
        code = main(typed(words))
        said = capsys.readouterr()
        # Two updates make a merge that is worse than the average, which is status 1.
        assert code == 0 or (words[0] == "merge-loras" and code == 1), f"danceopd {' '.join(words)}\n{said.err}"
        if words[:2] == ["data", "prepare"]:  # the configurations name a folder of their own
            shutil.copytree(desk / "cache", desk / "data" / "cache")
            for name in ("t2i", "edit"):
                shutil.copy(desk / "cache" / "rows.jsonl", desk / "data" / "cache" / f"{name}.jsonl")
