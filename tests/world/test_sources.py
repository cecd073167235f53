"""The embedded networks: what ships is what the card says, and the recipe trains and resumes."""

from dataclasses import replace

import pytest
import torch

from danceopd.core.schedule import sigma_grid
from danceopd.world import sources, stages
from danceopd.world.edits import GLOBAL_KINDS, LOCAL_KINDS
from danceopd.world.files import SHIPPED, load_model
from danceopd.world.scoring import Sampler, score_gedit, score_geneval


@pytest.fixture(scope="module")
def score():
    """score(network, task): on few pictures, so within some hundredths of the card's."""
    sampler = Sampler(sigma_grid(16, sources.SHIFT))

    def run(name, task):
        network = load_model(SHIPPED / f"{name}.safetensors")
        if task in ("t2i", "style"):
            return score_geneval(network, sampler, 5, 25, style=int(task == "style"))
        kinds = {"edit": LOCAL_KINDS + GLOBAL_KINDS, "local": LOCAL_KINDS, "global": GLOBAL_KINDS}[task]
        return score_gedit(network, sampler, 5, 100 // len(kinds), kinds=kinds)

    return run


def test_each_specialist_is_good_at_its_own_task(score):
    assert score("t2i", "t2i")["overall"] > 0.75
    assert score("style", "style")["style"] > 0.9
    for name in ("edit", "local", "global"):
        assert score(name, name)["average"] > 7.0


def test_each_specialist_is_clearly_worse_off_its_task(score):
    t2i, edit = score("t2i", "t2i")["overall"], score("edit", "edit")["average"]
    assert score("edit", "t2i")["overall"] < t2i - 0.2
    assert score("t2i", "edit")["average"] < edit - 2
    assert score("local", "global")["average"] < score("global", "global")["average"] - 1
    assert score("global", "local")["average"] < score("local", "local")["average"] - 1
    assert score("t2i", "style")["style"] < 0.1


def test_the_card_names_every_network():
    card = (SHIPPED / "README.md").read_text()
    for name in sources.STAGES:
        assert f"| {name} |" in card


def test_the_recipe_trains_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    base = replace(sources.STAGES[sources.TRUNK], steps=4, batch_size=4)
    monkeypatch.setitem(sources.STAGES, sources.TRUNK, base)
    monkeypatch.setitem(sources.STAGES, "t2i", replace(sources.STAGES["t2i"], steps=2, batch_size=4))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    sources.train_source(sources.TRUNK, whole)

    def killed(stage, text_length, step):
        if step == 2:
            raise KeyboardInterrupt
        return batch(stage, text_length, step)

    batch = sources.update_batch
    with monkeypatch.context() as patch:
        patch.setattr(stages, "SAVE_EVERY", 0.0)
        patch.setattr(sources, "update_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            sources.train_source(sources.TRUNK, parts)
    assert torch.load(parts / "trunk.pt", weights_only=True)["step"] == 2
    sources.train_source(sources.TRUNK, parts)
    a, b = (torch.load(folder / "trunk.pt", weights_only=True) for folder in (whole, parts))
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    sources.train_source("t2i", whole)
    assert load_model(whole / "t2i.safetensors").config == load_model(whole / "trunk.safetensors").config
