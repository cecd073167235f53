"""`danceopd sample` and `edit` with the miniature: the sizes that its pipeline takes, and what is refused in a line.

What the embedded networks need is tested here too: they draw without diffusers.
"""

import shutil
import subprocess
import sys

import pytest
from PIL import Image

from danceopd.cli.parser import main
from danceopd.world.files import SHIPPED

FEW = ("--num-inference-steps", "1", "--seed", "0", "--device", "cpu")


@pytest.fixture
def picture(tmp_path):
    """picture(width, height): the path of a red picture."""

    def make(width: int, height: int) -> str:
        Image.new("RGB", (width, height), "red").save(tmp_path / "photo.png")
        return str(tmp_path / "photo.png")

    return make


@pytest.mark.parametrize("size", [(3000, 2000), (128, 32), (64, 500)])
def test_a_picture_of_any_usual_shape_is_edited(size, picture, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert main(["edit", "miniature", picture(*size), "add a red cup", *FEW, "-o", str(out)]) == 0, capsys.readouterr()
    assert out.is_file()


def test_a_picture_too_long_for_the_pipeline_is_refused_before_it_is_loaded(picture, monkeypatch, capsys):
    monkeypatch.setattr("danceopd.evaluation.grid_pipeline.load_pipeline", None)
    assert main(["edit", "miniature", picture(500, 20), "add a red cup", *FEW]) == 2
    assert "a picture of 500 x 20 is too long to be edited: the pipeline takes up to 8 to 1" in capsys.readouterr().err


def test_a_resolution_below_the_least_picture_is_refused(picture, tmp_path, capsys):
    few = [*FEW, "-o", str(tmp_path / "out.png")]
    for what in (["sample", "miniature"], ["edit", "miniature", picture(64, 64)]):
        assert main([*what, "a red cup", "--resolution", "8", *few]) == 2
        assert "--resolution 8 is less than a picture of" in (err := capsys.readouterr().err)
        assert "at least 16" in err
    assert main(["sample", "miniature", "a red cup", "--resolution", "16", *few]) == 0


def test_a_picture_of_one_line_stands_above_its_edits(picture, tmp_path):
    assert main(["edit", "edit", picture(4000, 3), "add a red cup", *FEW, "-o", str(tmp_path / "out.png")]) == 0


def test_a_lora_that_is_not_there_is_named_before_the_pipeline_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("danceopd.evaluation.grid_pipeline.load_pipeline", None)
    assert main(["sample", "miniature", "a red cup", "--lora", "nope.safetensors", *FEW]) == 2
    assert "nope.safetensors: no LoRA there" in capsys.readouterr().err


def test_what_a_pipeline_refuses_is_said_in_a_line(monkeypatch, picture, capsys):
    def refuses(*_, **__):
        raise ValueError("Image too odd:\nit must be plain")

    monkeypatch.setenv("TQDM_DISABLE", "0")  # which --quiet sets, and which comes back after the test
    monkeypatch.setattr("diffusers.Flux2KleinPipeline.check_inputs", refuses)
    for what in (["sample", "miniature"], ["edit", "miniature", picture(64, 64)]):
        assert main([*what, "a red cup", *FEW, "--quiet"]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == ("danceopd: Flux2KleinPipeline refuses what it is asked for: Image too odd: it must be plain")


@pytest.fixture
def demo(tmp_path):
    """The folder of a run of the demo, whose student is the shipped base."""
    run = tmp_path / "demo"
    run.mkdir()
    shutil.copy("configs/demo.yaml", run / "config.yaml")
    shutil.copy(SHIPPED / "base.safetensors", run / "student.safetensors")
    return run


# Runs the command line in a process that has none of the packages of danceopd[models].
BARE = """
import sys
for name in ("diffusers", "transformers", "peft", "accelerate"):
    sys.modules[name] = None
from danceopd.cli.parser import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*arguments: str) -> subprocess.CompletedProcess:
    """Runs a command without diffusers."""
    return subprocess.run([sys.executable, "-c", BARE, *arguments], capture_output=True, text=True)


def test_embedded_networks_draw_and_edit_without_diffusers(picture, demo, tmp_path):
    out = tmp_path / "out.png"
    for what in (["sample", "base"], ["sample", str(demo)], ["edit", "edit", picture(64, 64)]):
        done = bare(*what, "a red car", *FEW, "-o", str(out))
        assert done.returncode == 0, done.stderr
        assert out.is_file()
        out.unlink()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "basse", "a red car"], "there is no basse"),
        (["edit", "edit", "nowhere.png", "add a cup"], "no picture at nowhere.png"),
        (["sample", "base", "a red car", "--checkpoint", "5"], "--checkpoint is of a run"),
        (["sample", "miniature", "a red car"], "need diffusers"),
    ],
)
def test_what_is_wrong_is_said_without_diffusers(arguments, says):
    done = bare(*arguments)
    assert done.returncode == 2
    assert says in done.stderr.replace("needs", "need")
    assert done.stderr.count("\n") == 1
