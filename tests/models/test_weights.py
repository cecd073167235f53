"""Weights that are read a piece at a time: what they say is what whole networks hold."""

import copy
import json
import re
import shutil

import hypothesis.strategies as st
import pytest
import tiny_sd3
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from safetensors.torch import load_file, save_file

from danceopd.models import saving
from danceopd.models.backbones import empty_transformer, sd3
from danceopd.models.loading import check_weights
from danceopd.models.lora_algebra import merge_into
from danceopd.models.saving import save_pretrained
from danceopd.models.tensor_files import check_finite
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
    with pytest.raises(UserError, match="the weights lack 1 tensor, such as proj_out"):
        check_fits(of_folder(tmp_path / "lacking"), empty, "here")
    save_file({**state, "proj_out.bias": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=re.escape("proj_out.bias is [1] in the file")):
        check_fits(of_folder(tmp_path / "lacking"), empty, "here")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        UserError, match=r"diffusion_pytorch_model.safetensors: is cut off within its header.*copy it again"
    ):
        of_folder(tmp_path / "lacking")


def test_a_number_that_only_float16_cannot_hold_is_no_damage(place, tmp_path):
    """An encoder that overflows for some rows is no reason to refuse the others."""
    network = sd3.load_transformer(place / "model")
    with torch.no_grad():
        network.proj_out.weight[0, 0] = 1e5
    network.save_pretrained(tmp_path)
    assert sd3.load_transformer(tmp_path, torch.float16).proj_out.weight[0, 0].isinf()
    assert sd3.load_transformer(tmp_path, torch.bfloat16).proj_out.weight[0, 0] == torch.tensor(1e5).bfloat16()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_that_are_not_finite_are_named_where_they_are_read(place, tmp_path, dtype, bad):
    network, name = sd3.load_transformer(place / "model"), "transformer_blocks.1.attn.to_k.weight"
    state = {key: value.clone() for key, value in network.state_dict().items()}
    if dtype.itemsize == 1:
        check_finite(tmp_path, name, state[name].to(dtype))
        bad = float("nan")  # which this storage has, and no infinity
    state[name][-1, -1] = bad
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite"):
        check_finite(tmp_path, name, state[name].to(dtype))
    if dtype.itemsize == 1:
        return
    network.load_state_dict(state)
    network.to(dtype).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: {name} holds numbers that are not finite"):
        sd3.load_transformer(tmp_path, dtype)
    weights = of_folder(tmp_path)
    weights.tensor(name.replace("to_k", "to_q"))
    with pytest.raises(UserError, match=f"{tmp_path}/diffusion_pytorch_model.safetensors: {name} holds numbers"):
        weights.tensor(name)


@pytest.mark.parametrize("name", ["model", "several"])
def test_weights_of_a_variant_are_read_like_any_others(name, place, tmp_path):
    network = sd3.load_transformer(place / name)
    sharded = {"max_shard_size": 80_000} if name == "several" else {}
    network.save_pretrained(tmp_path, variant="bf16", **sharded)
    assert all("bf16" in file.name for file in tmp_path.glob("*.safetensors*"))
    empty = empty_transformer(place / "model")
    check_weights(tmp_path, empty)
    state, found = network.state_dict(), of_folder(tmp_path)
    again = sd3.load_transformer(tmp_path).state_dict()
    for key, value in state.items():
        assert torch.equal(found.tensor(key), value)
        assert torch.equal(again[key], value)
    for file in tmp_path.glob("*bf16*.safetensors"):
        (tmp_path / file.name.replace("bf16", "fp16")).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="has its weights as bf16 and fp16; leave one"):
        check_weights(tmp_path)
    network.save_pretrained(tmp_path)  # its plain names count, whatever lies beside them
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    check_weights(tmp_path, empty)
    sd3.load_transformer(tmp_path)


@pytest.mark.parametrize("read", [check_weights, of_folder, sd3.load_transformer])
def test_a_file_that_is_no_whole_safetensors_file_is_named_with_what_it_is(read, place, tmp_path):
    network = sd3.load_transformer(place / "model")
    network.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    shorter = whole.replace(b'"F32"', b'"F16"', 1)
    for content, message in (
        (whole[:-1], f"is cut off at {len(whole) - 1} of {len(whole)} bytes; copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123456\n", "Git LFS pointer.*123456 bytes"),
        (b"<html>", "is a web page"),
        (b"", "it is empty"),
        (whole + b"x", "cannot be read as safetensors"),
        (shorter, "cannot be read as safetensors"),
        (b"\xff" * 5000, "cannot be read as safetensors"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path)
        assert str(file) in str(error.value)


def test_a_tensor_that_is_in_none_of_the_files_is_named_by_their_headers(place, tmp_path):
    shutil.copytree(place / "several", tmp_path / "lacking")
    index = tmp_path / "lacking" / "diffusion_pytorch_model.safetensors.index.json"
    files = sorted(index.parent.glob("*.safetensors"))
    check_weights(index.parent, empty_transformer(place / "model"))
    content = json.loads(index.read_text())
    content["weight_map"] = {key: name for key, name in content["weight_map"].items() if name != files[0].name}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the weights lack \d+ tensors"):
        check_weights(index.parent, empty_transformer(place / "model"))
    content["weight_map"]["proj_out.bias"] = "../model.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="names files outside its folder"):
        check_weights(index.parent)
    for file in (*files, index):
        file.unlink()
    torch.save({}, index.parent / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"there is diffusion_pytorch_model.bin, which is not read"):
        check_weights(index.parent)
