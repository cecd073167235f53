"""The example learns what its teachers know, and its notebook is its script."""

import ast
import base64
import json
import re
from pathlib import Path

import make_notebook
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "two_moons.py"


@pytest.fixture(autouse=True)
def _no_window(tmp_path, monkeypatch):
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)  # where the picture goes
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def notebook():
    return json.loads(SCRIPT.with_suffix(".ipynb").read_text(encoding="utf-8"))


def shorter(script: str, updates: int) -> str:
    short, found = re.subn(r"UPDATES, WIDTH, sigmas = \d+,", f"UPDATES, WIDTH, sigmas = {updates},", script)
    assert found == 1
    return short


def test_the_script_learns_and_draws(tmp_path, capsys):
    ends = []
    for updates in (1, 150):
        names = {"__name__": "__main__"}
        exec(compile(shorter(SCRIPT.read_text(encoding="utf-8"), updates), SCRIPT.name, "exec"), names)
        ends.append(float(re.search(r"end (\d+\.\d+) apart", capsys.readouterr().out)[1]))
    assert ends[1] < ends[0] / 3  # 0.87 after one update and 0.22 after 150 of 1,000
    picture = Image.open(tmp_path / "two_moons.png")
    assert picture.size == (1320, 720)
    assert len(picture.getcolors(maxcolors=2**20)) > 100


def test_the_teachers_know_their_moons():
    """Their field is the mean of noise - data over the data that may lie behind a state: by sampling, in float64."""
    names = {"__name__": "__main__"}
    head = SCRIPT.read_text(encoding="utf-8").split("# %%\nteachers")[0]
    exec(compile(head, SCRIPT.name, "exec"), names)
    points, generator = names["moon"].double(), torch.Generator().manual_seed(0)
    state, sigma, width = torch.tensor([[0.3, 0.1]], dtype=torch.float64), 0.4, names["WIDTH"]
    chosen = torch.randint(len(points), (400_000,), generator=generator)
    data = points[chosen] + width * torch.randn(len(chosen), 2, generator=generator, dtype=torch.float64)
    noise = (state - (1 - sigma) * data) / sigma
    likely = (-noise.square().sum(1) / 2).softmax(0)[:, None]
    velocity = names["teacher"](points, state, torch.tensor([sigma], dtype=torch.float64), None)
    torch.testing.assert_close(velocity[0], (likely * (noise - data)).sum(0), rtol=0, atol=0.01)


@pytest.mark.parametrize("script", make_notebook.SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_and_was_run(script):
    assert not make_notebook.is_new(script), "make docs"
    cells = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    assert cells[-1]["outputs"]


def test_the_notebook_shows_what_it_printed_and_its_picture(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    (printed,) = [output for output in outputs if output["output_type"] == "stream"]
    assert float(re.search(r"end (\d+\.\d+) apart", "".join(printed["text"]))[1]) < 0.04
    (shown,) = [output for output in outputs if output["output_type"] == "display_data"]
    assert base64.b64decode(shown["data"]["image/png"]).startswith(b"\x89PNG")


def test_the_cells_of_the_notebook_run(notebook):
    """The committed ones, one after the other, in names of their own."""
    names, outputs = {"__name__": "__main__"}, []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            text = "".join(cell["source"])
            outputs += make_notebook.run(shorter(text, 2) if number == 1 else text, names)
    assert [output["output_type"] for output in outputs] == ["stream", "display_data"]


def test_examples_need_the_stable_names_alone():
    for path in SCRIPT.parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("danceopd.")], path
            if isinstance(node, ast.ImportFrom):
                assert not node.module.startswith("danceopd."), path


@pytest.mark.slow
def test_two_loras_are_merged_and_drawn_with(tmp_path, capsys):
    script = SCRIPT.with_name("merge_two_loras.py").read_text(encoding="utf-8")
    short, found = re.subn(r"STEPS, WORK = \d+,", "STEPS, WORK = 2,", script)
    assert found == 1
    exec(compile(short, "merge_two_loras.py", "exec"), {"__name__": "__main__"})
    assert "night + wood" in capsys.readouterr().out
    assert Image.open(tmp_path / "two_loras.png").size == (1320, 880)
