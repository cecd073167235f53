"""A user's manifest as training data of the embedded network."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import good, jsonl, picture
from PIL import Image

from danceopd.cli.parser import main
from danceopd.world import own_data
from danceopd.world.own_data import ManifestData, fit_square
from danceopd.world.tokenizer import tokenize


@pytest.fixture
def folder(tmp_path):
    """A data folder with one good picture."""
    picture(tmp_path / "a.png")
    return tmp_path


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_size_becomes_a_square(tmp_path_factory, width, height, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("any")
    Image.fromarray(pixels).save(folder / "a.png")
    result = ManifestData(jsonl(folder / "m.jsonl", [good()]), "t2i", size).targets([0])
    assert result.shape == (1, 3, size, size)
    assert result.dtype == torch.float32
    assert result.abs().max() <= 1
    if width == height == size:
        assert torch.equal(result[0], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 255))
def test_one_colour_stays_that_colour(width, height, size, value):
    result = fit_square(Image.new("RGB", (width, height), (value, 0, 255)), size)
    assert result.getcolors() == [(size * size, (value, 0, 255))]


def test_the_middle_is_kept_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(fit_square(Image.fromarray(pixels), 16)), pixels[:, 12:28])


def test_manifest_data(folder):
    picture(folder / "b.png", (30, 20), (0, 0, 255))
    records = [
        good(prompt="one"),
        good(task="edit", prompt="two", source_image="a.png", target_image="b.png"),
        good(prompt="three", target_image="b.png"),
        good(task="style", target_image=None),
    ]
    path = jsonl(folder / "m.jsonl", records)
    data = ManifestData(path, "t2i", 16)
    assert len(data) == 2
    assert data.prompts([1, 0, 1]) == ["three", "one", "three"]
    assert not data.has_source
    assert data.sources([0]) is None
    targets = data.targets([1, 0, 1])
    assert targets[:, :, 3, 3].tolist() == [[-1, -1, 1], [1, -1, -1], [-1, -1, 1]]
    assert torch.equal(data.targets([1, 0, 1]), targets)  # the second time from memory
    assert data.targets([]).shape == (0, 3, 16, 16)
    edit = ManifestData(path, "edit", 16)
    assert edit.has_source
    assert edit.sources([0])[0, :, 0, 0].tolist() == [1, -1, -1]
    assert ManifestData(path, "style", 16).targets([0]) is None
    with pytest.raises(ValueError, match=r"no rows of 'edits'.*mean 'edit'.*capability: NAME"):
        ManifestData(path, "edits", 16)


def test_mixtures_of_pictures_are_refused(folder):
    path = jsonl(folder / "m.jsonl", [good(source_image=["a.png"]), good(source_image=["a.png", "a.png"])])
    with pytest.raises(
        ValueError, match=r"1 rows .*several source pictures \(line 2\); the embedded network takes one"
    ):
        ManifestData(path, "t2i", 8)
    path = jsonl(folder / "m.jsonl", [good(source_image="a.png")] + [good()] * 7)
    with pytest.raises(ValueError, match=r"7 of 8 .*source_image \(line 2, 3, 4, 5, 6, and 2 more\)"):
        ManifestData(path, "t2i", 8)
    data = ManifestData(jsonl(path, [good(), good(target_image=None)]), "t2i", 8)
    with pytest.raises(ValueError, match=r"target_image \(line 2\)"):
        data.targets([0])


def test_problems_stop_training(folder):
    path = jsonl(folder / "m.jsonl", [good(), "oops"])
    with pytest.raises(ValueError, match=r"1 problem.*line 2: not JSON"):
        ManifestData(path, "t2i", 8)
    jsonl(path, [good(), good(target_image="cut.png")])
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:40])
    data = ManifestData(path, "t2i", 8)
    data.targets([0])
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: target_image .*cut\.png"):
        data.targets([0, 1])


def test_memory_for_pictures_is_limited(folder, monkeypatch):
    monkeypatch.setattr(own_data, "CACHE_BYTES", 3 * 8 * 8)
    picture(folder / "b.png", color=(0, 255, 0))
    data = ManifestData(jsonl(folder / "m.jsonl", [good(), good(target_image="b.png")]), "t2i", 8)
    for _ in range(2):
        assert data.targets([0, 1])[:, 0, 0, 0].tolist() == [1, -1]
    assert len(data._cache) == 1


def test_prompts_that_the_network_cuts_are_said(folder, tmp_path, capsys):
    prompts = ["a dog", "a photo of a red car and a blue cup and a green bench and two cats"]
    rows = [good(prompt=prompt) for prompt in (*prompts, *prompts[:1])]
    path = jsonl(folder / "m.jsonl", rows)
    long = tokenize(prompts, 60)
    cut = (long[:, 10:] != long[0, -1]).any(dim=1)  # the last one is padding
    assert cut.tolist() == [False, True]
    said = "of 3 prompts 1 is longer than the network's 10 tokens and cut there: line 2"
    assert ManifestData(path, "t2i", 8).notes(10) == [said]
    assert ManifestData(path, "t2i", 8).notes(60) == []
    changes = [f"capabilities.t2i.data={{manifest: {path}}}", f"training.output_dir={tmp_path / 'run'}"]
    assert main(["train", "--config", "configs/demo.yaml", "--dry-run", *changes]) == 0
    assert f"t2i: {said}" in capsys.readouterr().out
