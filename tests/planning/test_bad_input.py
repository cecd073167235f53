"""Files as broken downloads and mistakes leave them: the dry run says in one line which, what, and what to do."""

import json
import re
import shutil
import struct

import pytest
import torch
from model_runs import config_of
from safetensors.torch import load_file, save_file

from danceopd.models.tensor_files import TAIL
from danceopd.planning.dry_run import dry_run
from danceopd.planning.models import examine

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 97\n"
REFUSED = b'{"error":"Access to model x is restricted and you are not in the authorized list."}'

# What is in a file's place: what is said of it.
CONTENTS = {
    b"": "it is empty, of 0 bytes; copy it again",
    POINTER: "is a Git LFS pointer .* in place of the file of 97 bytes; fetch it",
    b"<!DOCTYPE html><title>Sign in": "is a web page and no safetensors file.*download it again",
    REFUSED: "is text and no safetensors file.*Access to model x is restricted.*download it again",
    b"GGUF\x03" + bytes(200): "is a GGUF file.*get it as safetensors",
    b"\x1f\x8b\x08" + bytes(200): "is a gzip archive; unpack it",
    b"PK\x03\x04" + bytes(200): "holds pickled weights.*get it as safetensors",
    bytes(5000): "begins with zeros, as a download leaves it that did not end; copy it again",
}


def layer_of(tensors: dict) -> str:
    return min(key for key in tensors if "lora_A" in key).removesuffix(".lora_A.weight")


def nan(tensors):
    return {key: value * float("nan") if key.startswith(layer_of(tensors)) else value for key, value in tensors.items()}


def alphas_of_zero(tensors):
    zeros = {key.replace(".lora_A.weight", ".alpha"): torch.zeros(()) for key in tensors if "lora_A" in key}
    return tensors | zeros


def under_another_prefix(tensors):
    layer = layer_of(tensors)
    again = {key: value for key, value in tensors.items() if key.startswith(f"{layer}.")}
    return tensors | {key.replace("transformer.", "diffusion_model.", 1): value + 1 for key, value in again.items()}


def wider(tensors):
    return {key: torch.cat([value, value], 1 if "lora_A" in key else 0) for key, value in tensors.items()}


def deeper(tensors):
    more = {key.replace(".1.", ".7.", 1): value.clone() for key, value in tensors.items() if ".1." in key}
    return tensors | more


def of_sdxl(tensors):
    names = [f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_{x}" for x in "qk"]
    names += [f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1" for i in range(9)]
    shapes = {"lora_down": (4, 16), "lora_up": (16, 4)}
    return {f"{name}.{side}.weight": torch.ones(*shape) for name in names for side, shape in shapes.items()}


LORAS = {
    "nan": (nan, "holds numbers that are not finite"),
    "zero": (lambda t: {k: v * ("lora_A" in k) for k, v in t.items()}, "changes nothing: in every layer a factor or"),
    "alphas of zero": (alphas_of_zero, "changes nothing: in every layer a factor or alpha is zero"),
    "empty": (lambda t: {}, "holds no tensors"),
    "half of it": (lambda t: {k: v for k, v in t.items() if "lora_A" in k}, "only one of its two factors"),
    "a layer twice": (under_another_prefix, "diffusion_model.* and transformer.* are the same factor of"),
    "of a wider model": (wider, r"the LoRA's factors are .*; it was trained for another model"),
    "of a deeper model": (deeper, r"has such blocks 0 to 1 and no \S+\.7\.\S+, so that the file is of a larger model"),
    "of SDXL": (of_sdxl, "its keys are those of a UNet, as Stable Diffusion 1, 2 and XL have one"),
}


def said(root, **changes) -> str:
    """The only problem that the dry run finds."""
    (problem,) = dry_run(config_of(root, **changes), examine).problems
    assert "\n" not in problem
    return problem


def lora_at(path):
    return {"sources.one": {"lora": [{"path": str(path)}]}}


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: content[:8].decode(errors="replace") or "nothing")
def test_what_lies_in_the_place_of_weights_is_named(content, places, tmp_path):
    root, message = places("klein"), CONTENTS[content]
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(content)
    matches(said(root, **lora_at(lora)), "sources.one.lora", lora, message)
    shutil.copytree(root / "other", tmp_path / "other")
    shard = min((tmp_path / "other").glob("*.safetensors"))
    shard.write_bytes(content)
    matches(said(root, **{"sources.one": {"weights": str(tmp_path / "other")}}), "sources.one.weights", shard, message)
    matches(said(root, **{"sources.one": {"weights": str(lora)}}), "sources.one.weights", lora, message)


def matches(problem: str, key: str, file, message: str) -> None:
    assert problem.startswith(f"{key}: {file}"), problem
    assert re.search(message, problem), problem


@pytest.mark.parametrize("kind", LORAS)
def test_a_lora_that_can_teach_nothing_here_is_named(kind, places, tmp_path):
    root, (change, message) = places("klein"), LORAS[kind]
    file = tmp_path / "lora.safetensors"
    save_file({key: value.clone() for key, value in change(load_file(root / "one.safetensors")).items()}, file)
    matches(said(root, **lora_at(file)), "sources.one.lora", file, message)


def test_lora_and_weights_in_each_others_place_are_named(places, tmp_path):
    root = places("klein")
    problem = said(root, **lora_at(root / "other.safetensors"))
    assert "it holds weights and no LoRA: give it as the source's weights" in problem
    problem = said(root, **{"sources.one": {"weights": str(root / "one.safetensors")}})
    assert "it is a LoRA: give it as the source's lora" in problem
    shutil.copy(root / "one.safetensors", tmp_path / "pytorch_lora_weights.safetensors")
    problem = said(root, **{"sources.one": {"weights": str(tmp_path)}})
    assert f"{tmp_path} holds a LoRA (pytorch_lora_weights.safetensors): give it as sources.one.lora" in problem


def test_a_name_that_a_header_has_twice_is_refused(places, tmp_path):
    root = places("klein")
    whole = (root / "other.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + length].decode().rstrip(), whole[8 + length :]
    name, entry = next((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    again = json.dumps({name: entry | {"data_offsets": [len(data), len(data) + size]}})
    header = f"{header[:-1]},{again[1:]}"
    file = tmp_path / "twice.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data + bytes(size))
    problem = said(root, **{"sources.one": {"weights": str(file)}})
    matches(problem, "sources.one.weights", file, f"cannot be read as safetensors.*{name}")


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("content", [b"", POINTER, b"<html>"])
def test_what_lies_in_the_place_of_a_configuration_is_named(name, content, places, tmp_path):
    shutil.copytree(places("klein") / "model", tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(content)
    found = dry_run(config_of(places("klein"), model=str(tmp_path / "model")), examine).problems
    what = {b"": "is empty, of 0 bytes; copy it again", POINTER: "is a Git LFS pointer", b"<html>": "is a web page"}
    assert any(f"model: {tmp_path / 'model' / name} {what[content]}" in problem for problem in found), found


def test_a_size_in_a_configuration_that_the_rows_do_not_have_is_said(places, tmp_path):
    shutil.copytree(places("sd3") / "model", tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "config.json"
    sizes = json.loads(file.read_text())
    file.write_text(json.dumps({**sizes, "pooled_projection_dim": 10 * sizes["pooled_projection_dim"]}))
    found = dry_run(config_of(places("sd3"), model=str(tmp_path / "model")), examine).problems
    assert any("forward does not take what these rows hold" in problem for problem in found), found
    assert any("time_text_embed" in problem for problem in found), found  # the weights do not fit it either


def test_a_file_that_ends_in_zeros_is_warned_of(places, tmp_path):
    root = places("klein")
    shutil.copytree(root / "model", tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: -2 * TAIL] + bytes(2 * TAIL))
    plan = dry_run(config_of(root, model=str(tmp_path / "model")), examine)
    assert plan.problems == []
    assert any(line.startswith(f"model: {file} ends in 64 KiB of zeros") for line in plan.warnings)
    assert not any("of zeros" in line for line in dry_run(config_of(root), examine).warnings)


def test_weights_that_are_not_finite_are_named(places, tmp_path):
    root = places("klein")
    shutil.copytree(root / "other", tmp_path / "other")
    for shard in (tmp_path / "other").glob("*.safetensors"):
        save_file({key: value * float("nan") for key, value in load_file(shard).items()}, shard)
    problem = said(root, **{"sources.one": {"weights": str(tmp_path / "other")}})
    assert f"{tmp_path / 'other'}/" in problem
    assert "holds numbers that are not finite" in problem
