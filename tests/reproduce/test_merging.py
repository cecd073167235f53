"""What is kept of LoRAs that are merged, and the benchmark's own arithmetic."""

import json
from dataclasses import replace

import pytest

from danceopd.miniature.looks import LOOKS
from danceopd.models.lora_merges import COMBINATIONS, WEIGHTS
from danceopd.reproduce import merging
from danceopd.reproduce.matrix import BUDGETS, DRAWN_STEPS, MERGE_DRAWN, runs
from danceopd.reproduce.measure import VALIDATION_SEED
from danceopd.reproduce.merging import SEED, Bench, kept, look_sets, make


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


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The bench of two LoRAs, whose merges are (their combination, the weights) in the place of fields."""
    monkeypatch.setattr(merging, "combined", lambda loras, *how: how)
    monkeypatch.setattr(Bench, "field", lambda bench, lora: lora)
    return Bench(tmp_path, 2)


def test_a_merges_weight_is_chosen_on_other_prompts_than_the_tables(bench, monkeypatch):
    best, deceptive = WEIGHTS[1], WEIGHTS[-1]  # on validation prompts, and on those that the table is measured on

    def measure(canvas, field, count, seed, pictures=None):
        right = best if seed == VALIDATION_SEED else deceptive
        share = 0.5 if field(("night",)) == ("linear", [right] * count) else 0.25
        return dict.fromkeys(("", "night", "wood", "night + wood"), share)

    monkeypatch.setattr(merging, "measure", measure)
    assert VALIDATION_SEED not in [SEED + 1000 * seed for seed in range(10)]
    assert bench.best_weight("linear") == best


def test_joint_training_pays_for_the_pictures_that_the_loras_draw(tmp_path, monkeypatch):
    """The training itself is made up: 40 evaluations in its log."""

    def train(folder):
        folder.mkdir(parents=True)
        line = {"step": 5, "loss": 1.0, "network_evaluations": 40, "seconds": 2.0}
        (folder / "log.jsonl").write_text(f"{json.dumps(line)}\n")
        return folder

    monkeypatch.setattr(merging, "train", lambda config, *_: train(config.training.output_dir))
    monkeypatch.setattr(merging, "merge_loras", lambda *given: train(given[-1].work / "rank-8"))
    monkeypatch.setattr(merging, "draw_rows", lambda rows, path, *_: path.write_bytes(rows.read_bytes()))
    monkeypatch.setattr(merging, "field_of", lambda *_: None)
    monkeypatch.setattr(merging, "PROMPTS", 8)
    monkeypatch.setattr(merging, "measure", lambda *_: dict.fromkeys(("", "night", "wood", "night + wood"), 0.5))
    made = {
        run.row: make(run, tmp_path / run.row, tmp_path)["network_evaluations"]
        for run in runs("merge", BUDGETS["paper"], 1)
        if run.row in ("danceopd_2", "joint_samples_2")
    }
    assert made == {"danceopd_2": 40, "joint_samples_2": 40 + MERGE_DRAWN * DRAWN_STEPS}


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
