"""`danceopd evaluate CHECKPOINT`: what stands for an embedded network, and what other commands score."""

import json
import shutil

import pytest

from danceopd.cli.parser import main
from danceopd.miniature.shipped import shipped_sources
from danceopd.world.files import SHIPPED

FEW = ("--per-task", "1", "--per-kind", "1", "--num-inference-steps", "1")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, config): a run's folder of a configuration, with no student yet."""
    configs = SHIPPED.parents[3] / "configs"
    monkeypatch.chdir(tmp_path)

    def make(name: str, config: str):
        (folder := tmp_path / "runs" / name).mkdir(parents=True)
        (folder / "config.yaml").write_text(f"extends: {configs / config}\n")
        return folder

    return make


def test_a_runs_folder_stands_for_its_student(run, tmp_path, capsys):
    folder = run("demo", "demo.yaml")
    assert main(["evaluate", "runs/demo", *FEW]) == 2
    assert "runs/demo holds no student yet" in capsys.readouterr().err
    shutil.copy(SHIPPED / "base.safetensors", folder / "student.safetensors")
    rows = {}
    for given in ("runs/demo", "runs/demo/student.safetensors"):
        assert main(["evaluate", given, *FEW, "--json", str(tmp_path / "row.json")]) == 0
        rows[given] = json.loads((tmp_path / "row.json").read_text())
    names = [row.pop("name") for row in rows.values()]
    assert names == ["demo", "student"]
    assert rows["runs/demo"] == rows["runs/demo/student.safetensors"]


@pytest.mark.parametrize("given", ["runs/model", "runs/model/student"])
def test_of_a_models_run_it_says_what_scores_it(given, run, capsys):
    (run("model", "miniature.yaml") / "student").mkdir()
    assert main(["evaluate", given, *FEW]) == 2
    err = capsys.readouterr().err
    assert "runs/model is a model's run, and this scores the embedded network; type danceopd report runs/model" in err
    assert "danceopd evaluate geneval OUT --metadata FILE --model" in err
    assert err.endswith("--lora runs/model/student\n")


@pytest.mark.parametrize("given", ["miniature", "miniature/night", "file"])
def test_of_a_pipeline_and_a_lora_it_says_what_scores_them(given, capsys):
    given = str(next(iter(shipped_sources().values()))) if given == "file" else given
    assert main(["evaluate", given, *FEW]) == 2
    assert "is scored by danceopd evaluate geneval OUT --metadata FILE --model" in capsys.readouterr().err
