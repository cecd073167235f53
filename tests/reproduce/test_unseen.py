"""`danceopd reproduce unseen`: edits of objects that the edit source saw, and of those that it never saw."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from danceopd.miniature.edits import HALF, KINDS
from danceopd.miniature.evaluate import edit_set
from danceopd.miniature.looks import CLASSES
from danceopd.miniature.shipped import shipped_sources
from danceopd.reproduce import miniature
from danceopd.reproduce.matrix import Budget, runs
from danceopd.reproduce.run import Folders, gather, make_run, untrained_run
from danceopd.reproduce.unseen import GROUPS, UNSEEN

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = Budget("quick", main=1, short=1, ablation=1, miniature=2000, merge=1, seeds=1)


@pytest.mark.parametrize(("metric", "others"), [("gedit_seen", UNSEEN), ("gedit_unseen", HALF)])
def test_a_groups_pictures_show_objects_of_that_group_alone(metric, others):
    _, before, after = edit_set(3, 4, KINDS, GROUPS[metric])
    for scene in (before, after):
        assert not set(scene.things[scene.occupied].tolist()) & set(others)


def test_both_groups_together_are_all_objects():
    assert sorted([*HALF, *UNSEEN]) == list(range(len(CLASSES)))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", ["two_to_one", "all_objects"])
def test_a_student_is_measured_beside_its_sources(row, tmp_path, monkeypatch):
    raw = yaml.safe_load((CONFIGS / "miniature_unseen.yaml").read_text())
    raw["evaluation"] |= {"per_task": 1, "per_kind": 1, "num_inference_steps": 4}
    raw["training"]["batch_size"] = 8
    (tmp_path / "miniature_unseen.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(miniature, "DRAWN_SAMPLES", 8)
    folders = Folders(tmp_path, tmp_path / "work", tmp_path / "results")
    folders.results.mkdir()
    # Another source stands for the narrow one, which takes an hour.
    shutil.copytree(shipped_sources()["edit"].parent, folders.work / "unseen" / "sources" / "edit-half")
    (student,) = [run for run in runs("unseen", TINY, 1) if run.row == row]
    for run in (*untrained_run("unseen"), student):
        make_run(run, folders)
    gather("unseen", TINY, folders, 1)
    rows = {row["method"]: row for row in json.loads((folders.results / "unseen.json").read_text())["rows"]}
    assert rows.keys() == {"base", "source_t2i", "source_edit", "source_edit_all", "merge_cat", row}
    assert rows["source_edit"]["gedit_unseen"]["mean"] == rows["source_edit_all"]["gedit_unseen"]["mean"]
    assert rows[row]["network_evaluations"] >= 1000
    assert 0 <= rows[row]["gedit_seen"]["mean"] <= 10
    log = [json.loads(line) for line in (folders.work / student.name / "log.jsonl").read_text().splitlines()]
    asked = {name for line in log for name in line.get("loss_by_capability", ())}
    assert asked == {"t2i", "edit" if row == "all_objects" else "edit-half"}
