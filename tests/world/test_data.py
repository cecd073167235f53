"""The picture world as training data."""

import pytest
import torch
from PIL import Image

from danceopd.data.manifest import check_manifest
from danceopd.world.data import CAPABILITIES, WorldData, write_world
from danceopd.world.detector import detect
from danceopd.world.edits import GLOBAL_KINDS, KINDS, LOCAL_KINDS
from danceopd.world.own_data import ManifestData


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("split", ["seen", "held_out"])
def test_world_data(capability, split):
    data, again, other = (WorldData(capability, 64, seed, split) for seed in (3, 3, 4))
    index = [5, 0, 63, 5]
    assert len(data) == 64
    assert data.prompts(index) == again.prompts(index)
    assert data.prompts(list(range(64))) != other.prompts(list(range(64)))
    targets = data.targets(index)
    assert targets.shape == (4, 3, 32, 32)
    assert targets.dtype == torch.float32
    assert torch.equal(targets, again.targets(index))
    assert torch.equal(targets[0], targets[3])
    assert data.has_source == (capability in ("edit", "local", "global"))
    assert (data.sources(index) is not None) == data.has_source
    if data.has_source:
        assert torch.equal(data.sources(index), again.sources(index))
        assert (data.sources(index) != targets).flatten(1).any(1).all()  # every edit changes something


def test_world_capabilities_differ():
    index = list(range(100))
    verbs = {
        capability: {text.split()[0] for text in WorldData(capability, 100, 0).prompts(index)}
        for capability in ("local", "global", "edit")
    }
    assert verbs["local"] == {"add", "remove", "replace", "make"}
    assert verbs["global"] == {"change", "turn"}
    assert verbs["edit"] == verbs["local"] | verbs["global"]
    assert (len(LOCAL_KINDS), len(GLOBAL_KINDS)) == (4, 2)
    assert len(KINDS) == 6
    assert all(text.startswith("a sketch of") for text in WorldData("style", 9, 0).prompts(list(range(9))))
    assert detect(WorldData("style", 9, 0).targets(list(range(9)))).scene.style.eq(1).all()


def test_world_refuses():
    with pytest.raises(ValueError, match=r"'styles'.*did you mean 'style'"):
        WorldData("styles", 4, 0)
    with pytest.raises(ValueError, match=r"'heldout'.*did you mean 'held_out'"):
        WorldData("t2i", 4, 0, "heldout")
    with pytest.raises(ValueError, match="0 samples"):
        WorldData("t2i", 0, 0)


def test_world_round_trip(tmp_path):
    path = write_world(tmp_path / "world", ["t2i", "edit"], size=12, seed=7)
    assert path == tmp_path / "world" / "manifest.jsonl"
    assert check_manifest(path, needs_source=["edit"]) == []
    index = list(range(12))
    for capability in ("t2i", "edit"):
        data, read = WorldData(capability, 12, 7), ManifestData(path, capability, 32)
        assert len(read) == len(data)
        assert read.prompts(index) == data.prompts(index)
        assert read.has_source == data.has_source
        torch.testing.assert_close(read.targets(index), data.targets(index), atol=1 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(read.sources(index), data.sources(index), atol=1 / 255 + 1e-6, rtol=0)
    with pytest.raises(FileExistsError, match="there already"):
        write_world(tmp_path / "world", ["t2i"], size=1, seed=0)
    with pytest.raises(ValueError, match="no capability"):
        write_world(tmp_path / "other", ["t2i", "paint"], size=1, seed=0)
    assert not (tmp_path / "other").exists()


def test_a_broken_write_leaves_no_manifest(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_world(tmp_path, ["t2i"], size=1, seed=0)
    assert not (tmp_path / "manifest.jsonl").exists()
