"""The commands of README and of the pages, run as a reader types them.

The miniature stands in for the models that they name, one process for several, and a run ends after an update or two.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny_geneval
from pages import ROOT, blocks
from PIL import Image
from safetensors.torch import load_file, save_file

from danceopd.cli.parser import main
from danceopd.miniature.data import write_miniature
from danceopd.miniature.shipped import PIPELINE, shipped_sources

# A method of one's own has a test of its own; a reference of commands holds none.
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.stem != "adding-a-method"]

WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a transformer's folder

# What a page takes as done.
DEMO = "train --config configs/demo.yaml"
PREPARED = "data prepare rows.jsonl --model MODEL --cache cache"
OF_A_MODEL = (PREPARED, "train --config configs/models/qwen-image-edit-2511-a.yaml training.output_dir=runs/model")
SCORED = "evaluate geneval {0} --metadata evaluation_metadata.jsonl --model MODEL {1}"
SCORED += " --detector mask2former-swin-small-coco-instance --clip clip-vit-large-patch14"
BEFORE = {
    **dict.fromkeys(("small-cards.md", "fp8.md", "zero3.md"), (PREPARED,)),
    "runs.md": (DEMO, *OF_A_MODEL),
    "sampling.md": (DEMO, *OF_A_MODEL),
    "evaluation.md": (
        *(DEMO, *OF_A_MODEL, "export runs/model -o my_lora"),
        *(SCORED.format("out_base", ""), SCORED.format("out_student", "--lora my_lora")),
    ),
}

STAND_IN = {"model=MODEL": "model=miniature", "500": "1", "1000": "2"}  # a run of two updates has these checkpoints
MODELS = ("MODEL", "FOLDER", "black-forest-labs/FLUX.2-klein-base-4B", "stabilityai/stable-diffusion-3.5-medium")
STAND_IN |= dict.fromkeys(MODELS, "miniature")

# What ends a command soon, and what it cannot have here: models at their paths, other optimizers' packages, a card.
MINIATURE = ["model=miniature", "student.lora.targets=all-linear"]
SMALL = ["training.max_steps=2", "training.batch_size=2", "training.gradient_accumulation_steps=1"]
SMALL += ["training.optimizer=adamw", "training.precision=fp32", "training.save_every=1"]
DEMO_SOON = ["training.max_steps=2", "evaluation.quick=1", "evaluation.per_task=1", "evaluation.per_kind=1"]
UNGUIDED = [f"{part}.embedded_guidance=null" for part in ("student", "sources.t2i", "sources.style")]
SOON = {
    "data prepare": ["--resolution", "64", "--max-sequence-length", "16", "--device", "cpu", "--dtype", "float32"],
    "merge-loras": ["--steps", "2", "--resolution", "64", "--max-sequence-length", "16", "training.batch_size=4"],
    "train configs/models": [*SMALL, *MINIATURE, "training.sample_every=0"],
    "train configs/paper": [*SMALL, *MINIATURE],
    "plan": MINIATURE,
    "train configs/models/flux.1-dev-c.yaml": UNGUIDED,
    "plan configs/models/flux.1-dev-c.yaml": UNGUIDED,
    "init my_loras": ["--base", "miniature"],  # which no file there names
    "train configs/demo.yaml": DEMO_SOON,
    "demo": DEMO_SOON,
    "evaluate geneval": ["--resolution", "64", "--num-inference-steps", "1", "--device", "cpu"],
    "check-model": ["--resolution", "64", "--dtype", "float32", "--device", "cpu"],
}

# A judge's address, minutes, until Ctrl-C, the hub: their own tests'.
ELSEWHERE = ("evaluate gedit", "evaluate reward", "compare results", "reproduce", "watch", "train --config CONFIG")
ELSEWHERE += ("train --config configs/paper/public",)


def commands(page: Path) -> list[list[str]]:
    """The words of each `danceopd` command of a page, those of more than one line as one."""
    code = "\n".join(blocks(page, "", "bash")).replace("\\\n", " ")
    code = re.sub(r"deepspeed --num_gpus \d train.py(.*?)( --deepspeed \S+)?$", r"danceopd train\1", code, flags=re.M)
    return [shlex.split(line, comments=True)[1:] for line in code.splitlines() if line.strip().startswith("danceopd ")]


def typed(words: list[str]) -> list[str]:
    """A command as it is run here, without what the shell makes of it."""
    words = [STAND_IN.get(word, word) for word in words[: words.index(">") if ">" in words else None]]
    words = [word.replace("$precision", "fp8").replace("$seed", "0") for word in words]
    config = next((word for word in words if word.startswith("configs/")), "")
    names = (" ".join(words[:2]), words[0], f"{words[0]} {config}", f"{words[0]} {Path(config).parent}")
    return words + [more for name, added in SOON.items() if name in names for more in added]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the pages take as there: configurations, LoRAs, a manifest, prompts, GenEval's models."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "loras").mkdir()
    sources = shipped_sources()
    names = {"loras/t2i": "t2i", "loras/edit": "edit", "loras/style": "night", "ink": "night", "oil": "wood"}
    for name, path in {**names, "edit": "edit"}.items():
        shutil.copy(sources[path], tmp_path / f"{name}.safetensors")
    tuned = shutil.copytree(PIPELINE / "transformer", tmp_path / "anime" / "transformer") / WEIGHTS
    save_file({name: weight * 1.01 for name, weight in load_file(tuned).items()}, tuned)
    rows = write_miniature(tmp_path, ["t2i", "edit", "night"], 4, 0)
    (tmp_path / "rows.jsonl").write_text(rows.read_text("utf-8").replace('"night"', '"style"'), "utf-8")
    (tmp_path / "prompts.csv").write_text("uid,task,prompt,source_image\n1,t2i,a dog,\n2,edit,add a cat,room.png\n")
    (tmp_path / "mine.txt").write_text("a dog\na cat\na dog\n", "utf-8")
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(tiny_geneval.line()) + "\n", "utf-8")
    tiny_geneval.save_detector(tmp_path / "mask2former-swin-small-coco-instance")
    tiny_geneval.save_clip(tmp_path / "clip-vit-large-patch14")
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
        if words[0] == "merge-loras":  # a page's examples are not one user's one after another
            for left in desk.glob("merged.*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        code = main(typed(words))
        said = capsys.readouterr()
        # Two updates make a merge that is worse than the average, which is status 1.
        assert code == 0 or (words[0] == "merge-loras" and code == 1), f"danceopd {' '.join(words)}\n{said.err}"
        if words[:2] == ["data", "prepare"] and words[-1] == "cache":  # the configurations name a folder of their own
            shutil.copytree(desk / "cache", desk / "data" / "cache", dirs_exist_ok=True)
            for name in ("t2i", "edit", "style"):
                shutil.copy(desk / "cache" / "rows.jsonl", desk / "data" / "cache" / f"{name}.jsonl")
