"""What is kept of LoRAs that are merged, and the benchmark's own arithmetic."""

from dataclasses import replace

import pytest

from danceopd.miniature.looks import LOOKS
from danceopd.models.lora_merges import COMBINATIONS
from danceopd.reproduce import merging
from danceopd.reproduce.matrix import BUDGETS, runs
from danceopd.reproduce.merging import kept, look_sets, make


def test_only_looks_that_fit_together_are_asked_for_together():
    sets = look_sets(8)
    assert sets[0] == ()
    assert {looks[0] for looks in sets if len(looks) == 1} == LOOKS.keys()
    pairs = {looks for looks in sets if len(looks) == 2}
    assert ("night", "wood") in pairs
    assert ("night", "sand") not in pairs  # a picture has one background
    assert len(pairs) == 28 - 4
    assert len(look_sets(2)) == 4


def test_kept_is_relative_to_each_lora_by_hand():
    by_hand = {"": 0.5, "night": 0.4, "wood": 0.8, "night + wood": 0.2}
    assert kept(by_hand, by_hand) == {"kept": 1, "base_kept": 1, "pairs": 1}
    own = {"": 0.25, "night": 0.4, "wood": 0.4, "night + wood": 0.3}
    assert kept(own, by_hand) == pytest.approx({"kept": 0.8 / 1.2, "base_kept": 0.5, "pairs": 1.5})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_row_of_two_loras_is_made_and_measured_once(tmp_path, monkeypatch):
    for looks, pictures in ((0, 4), (1, 8), (2, 8)):
        monkeypatch.setitem(merging.PICTURES, looks, pictures)
        monkeypatch.setitem(merging.FEW, looks, pictures)
    monkeypatch.setattr(merging, "WEIGHTS", (0.5, 1.0))
    monkeypatch.setattr(merging, "PROMPTS", 40)
    monkeypatch.setattr(merging, "MERGE_DRAWN", 8)
    table = runs("merge", BUDGETS["paper"], 1)
    (untrained,) = [run for run in table if run.row == "untrained_2"]
    methods = make(untrained, tmp_path / "untrained", tmp_path)["methods"]
    assert {"by_hand", "base", "sum", "sum_cut"} | {f"merge_{name}" for name in COMBINATIONS} == set(methods)
    assert methods["by_hand"]["kept"] == methods["by_hand"]["base_kept"] == methods["base"]["base_kept"] == 1
    assert methods["merge_svd"]["rank"] == methods["sum_cut"]["rank"] == methods["sum"]["rank"] / 2
    assert all(row["chosen"] in (0.5, 1.0) for name, row in methods.items() if name.startswith("merge_"))
    for run in table:
        if run.row in ("danceopd_2", "joint_samples_2"):
            small = {"training.max_network_evaluations": 60, "training.batch_size": 4}
            row = make(replace(run, overrides={**run.overrides, **small}), tmp_path / run.row, tmp_path)
            assert row["network_evaluations"] >= 60
            assert row["shares"].keys() == {"", "night", "wood", "night + wood"}
            assert row["rank"] == 8
    seen = sorted((tmp_path / "merge" / "measured_2").glob("*.json"))
    monkeypatch.setattr(merging, "measure", lambda *_: pytest.fail("what is known is measured again"))
    assert make(untrained, tmp_path / "untrained", tmp_path)["methods"] == methods
    assert sorted((tmp_path / "merge" / "measured_2").glob("*.json")) == seen
