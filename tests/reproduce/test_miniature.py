"""The table of the miniature: what joint training learns from and pays for, and which prompts are measured on."""

from pathlib import Path

import pytest
import torch
import yaml

from danceopd.config.reading import parse_config
from danceopd.data.prepared import PreparedData
from danceopd.miniature.evaluate import t2i_set
from danceopd.miniature.looks import IMAGE_SIZE
from danceopd.models.lora_merges import COMBINATIONS, WEIGHTS
from danceopd.reproduce import miniature
from danceopd.reproduce import run as driver
from danceopd.reproduce.matrix import DRAWN_EVALUATIONS, Budget, runs
from danceopd.reproduce.measure import VALIDATION_SEED
from danceopd.reproduce.run import Folders, make_run, untrained_run
from danceopd.world.prompts import PAIR_TASKS, TASKS
from danceopd.world.scoring import HELD_OUT_SEED

CONFIGS = Path(__file__).parents[2] / "configs"
EVALUATIONS = 24  # that a tiny training is left once its pictures are drawn
TINY = Budget("quick", main=1, short=1, ablation=1, miniature=DRAWN_EVALUATIONS + EVALUATIONS, merge=1, seeds=1)


@pytest.fixture
def folders(tmp_path):
    """The miniature's table with one picture of each task and kind in two steps."""
    raw = yaml.safe_load((CONFIGS / "miniature.yaml").read_text())
    raw["evaluation"] |= {"per_task": 1, "per_kind": 1, "quick": 1, "num_inference_steps": 2}
    raw["training"]["batch_size"] = 4
    (tmp_path / "miniature.yaml").write_text(yaml.safe_dump(raw))
    return Folders(tmp_path, tmp_path / "work", tmp_path / "results")


def test_joint_training_without_data_learns_from_pictures_that_the_sources_draw_and_pays_for_them(folders, monkeypatch):
    monkeypatch.setattr(miniature, "DRAWN_SAMPLES", 4)
    monkeypatch.setattr(miniature, "DRAWN_STEPS", 2)
    trained = []

    def train(config, *rest, **named):
        trained.append(config)
        return real(config, *rest, **named)

    real = driver.train
    monkeypatch.setattr(driver, "train", train)
    (run,) = [run for run in runs("miniature", TINY, 1) if run.row == "joint_samples"]
    result = make_run(run, folders)

    true = folders.work / "miniature" / "cache" / "manifest.jsonl"
    for name, capability in trained[0].capabilities.items():
        own, world = PreparedData(capability.data.prepared, name), PreparedData(true, name)
        assert [row["prompt"] for row in own.rows] == [row["prompt"] for row in world.rows]
        index = list(range(len(world)))
        assert ((own.targets(index) - world.targets(index)).flatten(1).norm(dim=1) > 1).all(), name

    points = [point[0] for point in result["curve"]]
    assert points[0] == DRAWN_EVALUATIONS
    assert points[-1] == result["network_evaluations"] >= DRAWN_EVALUATIONS + EVALUATIONS


class Blank:
    """A canvas that draws black pictures, and keeps what it is asked for."""

    def __init__(self):
        self.asked = []

    def drawer(self, field):
        def draw(prompts, pictures, seed):
            self.asked.append(prompts)
            return -torch.ones(len(prompts), 3, IMAGE_SIZE, IMAGE_SIZE)

        return draw


def test_the_held_out_figure_is_measured_on_prompts_that_no_training_saw(folders):
    config = parse_config(yaml.safe_load((folders.configs / "miniature.yaml").read_text()), [], "the miniature")
    canvas = Blank()
    assert "geneval_held_out" in miniature.measure(canvas, None, config, seed=7)
    seen, _, held_out = canvas.asked
    assert len(seen) == len(TASKS)
    assert held_out == [prompt.text for prompt in t2i_set(7 + HELD_OUT_SEED, 1, "held_out")[0]]
    assert len(held_out) == len(PAIR_TASKS)


def test_a_merges_weight_is_chosen_on_other_prompts_than_the_tables(folders, monkeypatch):
    best, deceptive = WEIGHTS[1], WEIGHTS[-1]  # on validation prompts, and on those that the table is measured on
    asked = []

    def measure(canvas, field, config, seed=None, pictures=None):
        asked.append((field, seed, pictures))
        right = best if seed == VALIDATION_SEED else deceptive
        return {"geneval_overall": float(field == right), "gedit_average": 0.0}

    monkeypatch.setattr(miniature, "measure", measure)
    monkeypatch.setattr(miniature, "merged", lambda model, loras, combination, weight: weight)
    monkeypatch.setattr(miniature, "field_of", lambda model, lora=None: None)
    monkeypatch.setattr(miniature, "canvas_of", lambda config: None)
    (run,) = untrained_run("miniature")
    rows = {row["method"]: row for row in make_run(run, folders)["rows"]}
    assert {rows[f"merge_{name}"]["chosen"] for name in COMBINATIONS} == {str(best)}
    final = [weight for weight, seed, pictures in asked if weight and (seed, pictures) == (None, None)]
    assert final == [best] * len(COMBINATIONS)
