"""`danceopd reproduce operators`: what is measured of an operator, and of a student that absorbs it."""

import json
from pathlib import Path

import pytest
import yaml

from danceopd.reproduce import absorbing, miniature
from danceopd.reproduce.matrix import OPERATORS, Budget, runs
from danceopd.reproduce.run import Folders, gather, make_run, untrained_run

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = Budget("quick", main=1, short=1, ablation=1, miniature=1000, merge=1, seeds=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_student_is_measured_beside_the_source_and_the_operator(tmp_path, monkeypatch):
    raw = yaml.safe_load((CONFIGS / "miniature_operators.yaml").read_text())
    raw["evaluation"] |= {"per_task": 1, "num_inference_steps": 4}
    raw["training"]["batch_size"] = 8
    (tmp_path / "miniature_operators.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(miniature, "DRAWN_SAMPLES", 8)
    few = {name: OPERATORS[name] for name in ("interval", "difference")}
    monkeypatch.setattr(absorbing, "OPERATORS", few)
    folders = Folders(tmp_path, tmp_path / "work", tmp_path / "results")
    folders.results.mkdir()
    (student,) = [run for run in runs("operators", TINY, 1) if run.row == "interval"]
    for run in (*untrained_run("operators"), student):
        make_run(run, folders)
    gather("operators", TINY, folders, 1)
    rows = {row["method"]: row for row in json.loads((folders.results / "operators.json").read_text())["rows"]}
    assert rows.keys() == {"source_t2i", "operator_interval", "operator_difference", "interval"}
    assert {"geneval_overall", "beta2", "beta3"} <= rows["source_t2i"].keys()
    assert 1 < rows["operator_interval"]["evaluations"]["mean"] < 2  # one outside of the interval
    assert rows["operator_difference"]["evaluations"]["mean"] == 2
    assert rows["interval"]["network_evaluations"] >= 250
    assert 0 <= rows["interval"]["geneval_overall"]["mean"] <= 1
