"""Weights that are read a piece at a time: what they say is what whole networks hold."""

import copy
import re

import hypothesis.strategies as st
import pytest
import tiny_sd3
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from danceopd.models import saving
from danceopd.models.backbones import empty_transformer, sd3
from danceopd.models.lora_algebra import merge_into
from danceopd.models.saving import save_pretrained
from danceopd.models.weights import check_fits, either, mean, of_folder, of_tensors, plus
from danceopd.support.errors import UserError
from danceopd.training.checkpoints import bounds


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A transformer in one file, and the same in several."""
    root = tmp_path_factory.mktemp("weights")
    model = tiny_sd3.save_tiny(root / "model")
    sd3.load_transformer(model).save_pretrained(root / "several", max_shard_size=80_000)
    return root


@given(size=st.integers(1, 7), data=st.data())
@settings(max_examples=20, deadline=None)
def test_the_pieces_of_any_number_of_ranks_are_the_whole(place, size, data):
    state = sd3.load_transformer(place / "model").state_dict()
    found = of_folder(place / data.draw(st.sampled_from(["model", "several"])))
    assert found.shapes == {name: tensor.shape for name, tensor in state.items()}
    name = data.draw(st.sampled_from(sorted(state)))
    pieces = [found.read(name, *bounds(state[name].numel(), rank, size)) for rank in range(size)]
    assert torch.equal(torch.cat(pieces), state[name].flatten())
    assert torch.equal(found.tensor(name), state[name])


def test_a_lora_and_a_mean_are_what_they_are_on_networks(place):
    network = sd3.load_transformer(place / "model")
    layer = "transformer_blocks.0.attn.to_q"
    out, width = network.get_submodule(layer).weight.shape
    lora = {layer: (torch.randn(3, width), torch.randn(out, 3), 0.5)}
    merged = merge_into(copy.deepcopy(network), lora).state_dict()
    both = plus(of_folder(place / "model"), lora)
    halves = mean([(0.25, of_folder(place / "model")), (0.75, both)])
    for name, tensor in merged.items():
        assert torch.allclose(both.tensor(name), tensor, rtol=0, atol=1e-6)
        assert torch.allclose(halves.tensor(name), 0.25 * network.state_dict()[name] + 0.75 * tensor, rtol=0, atol=1e-6)
        start = tensor.numel() // 3
        assert torch.allclose(both.read(name, start, start + 2), tensor.flatten()[start : start + 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shard", ["5GB", 80_000])
def test_what_is_written_is_what_save_pretrained_writes(place, tmp_path, monkeypatch, shard):
    monkeypatch.setattr(saving, "SHARD", shard)
    network = sd3.load_transformer(place / "model")
    sd3.load_transformer(place / "model", torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    save_pretrained(
        empty_transformer(place / "model"), of_tensors(network.state_dict()), tmp_path / "ours", torch.bfloat16
    )
    theirs, ours = (sorted(path.name for path in (tmp_path / who).iterdir()) for who in ("theirs", "ours"))
    assert theirs == ours
    for name in theirs:
        if name.endswith(".safetensors"):
            a, b = (load_file(tmp_path / who / name) for who in ("theirs", "ours"))
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    back = SD3Transformer2DModel.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert back.config.num_layers == network.config.num_layers


def test_the_first_comes_before_the_second():
    both = either(of_tensors({"a": torch.zeros(2)}), of_tensors({"a": torch.ones(2), "b": torch.ones(3)}))
    assert both.tensor("a").tolist() == [0, 0]
    assert both.tensor("b").tolist() == [1, 1, 1]


def test_files_that_are_not_good_are_named(place, tmp_path):
    network = sd3.load_transformer(place / "model")
    empty = empty_transformer(place / "model")
    with pytest.raises(UserError, match="no weights diffusion_pytorch_model"):
        of_folder(tmp_path)
    network.save_pretrained(tmp_path / "lacking")
    file = tmp_path / "lacking" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if name != "proj_out.bias"}, file)
    with pytest.raises(UserError, match="the weights lack 1 tensors, such as proj_out"):
        check_fits(of_folder(tmp_path / "lacking"), empty, "here")
    save_file({**state, "proj_out.bias": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=re.escape("proj_out.bias is [1] in the file")):
        check_fits(of_folder(tmp_path / "lacking"), empty, "here")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be read as safetensors, copy it again"):
        of_folder(tmp_path / "lacking")
