"""DanceOPD on a diffusers model, from files to files: two LoRA teachers, prepared rows, training, plain diffusers."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from model_runs import losses, teachers_config

from danceopd.api import distill
from danceopd.config.reading import parse_config
from danceopd.data.prepare import prepare
from danceopd.data.prepared import PreparedData
from danceopd.models.backbones import backbone_of, sd3
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import load_lora
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import LoraStudent
from danceopd.planning.dry_run import dry_run
from danceopd.planning.models import examine
from danceopd.support.errors import UserError
from danceopd.training.assembly.build import build_model


@pytest.fixture
def place(prepared_places):
    return prepared_places("sd3")


def config_of(place, folder, **training):
    return teachers_config(place, folder, **{f"training.{key}": value for key, value in training.items()})


def test_end_to_end(place, tmp_path):
    folder = distill(config_of(place, tmp_path / "run"))
    curve = losses(folder)
    assert len(curve) == 20
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])
    pipeline = StableDiffusion3Pipeline.from_pretrained(place / "model")
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "np"}
    before = pipeline("a cup", generator=torch.Generator().manual_seed(0), **options).images
    pipeline.load_lora_weights(folder / "student")
    after = pipeline("a cup", generator=torch.Generator().manual_seed(0), **options).images
    assert np.abs(after - before).max() > 1e-3
    # What diffusers draws with the file is what the student itself draws.
    transformer = sd3.load_transformer(place / "model")
    adapted = merge_into(
        copy.deepcopy(transformer), load_lora(folder / "student", transformer, StableDiffusion3Pipeline)
    )
    latents, sigma = torch.randn(2, 4, 4, 4), torch.tensor([0.9, 0.4])
    prompt = sd3.text_encoder(place / "model")(["a cup", "two"])
    theirs = sd3.velocity(pipeline.transformer, latents, sigma, prompt)
    torch.testing.assert_close(sd3.velocity(adapted, latents, sigma, prompt), theirs, rtol=1e-4, atol=1e-5)


def test_training_reads_only_the_cache(place, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(place / "model", copy)
    for part in copy.iterdir():
        if part.is_dir() and part.name.startswith(("text_encoder", "tokenizer")):
            shutil.rmtree(part)
    for part in (copy / "vae").glob("*.safetensors"):
        part.unlink()
    config = config_of(place, tmp_path / "run", max_steps=2)
    distill(config.model_copy(update={"model": copy}))
    assert len(losses(tmp_path / "run")) == 2


def test_resumed_is_uninterrupted(place, tmp_path):
    whole = distill(config_of(place, tmp_path / "whole", max_steps=4))
    distill(config_of(place, tmp_path / "parts", max_steps=2))
    parts = distill(config_of(place, tmp_path / "parts", max_steps=4))
    name = "student/pytorch_lora_weights.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_teachers_on_one_base_are_the_merged_ones(place, tmp_path):
    parts = build_model(config_of(place, tmp_path / "run"))
    rows = parts.samples.groups[0].data[0]
    conditioning = rows.condition([0, 1], [False, False])
    latents, sigma = torch.randn(2, 4, 4, 4), torch.tensor([0.8, 0.3])
    transformer = sd3.load_transformer(place / "model")
    for name, field, scale in zip(("one", "two"), parts.fields, (1.0, 2.0), strict=True):
        alone = merge_into(copy.deepcopy(transformer), load_lora(place / name, transformer, StableDiffusion3Pipeline))
        cond = sd3.velocity(alone, latents, sigma, conditioning.prompt)
        empty = {key: value[None].expand(2, *value.shape) for key, value in rows.empty_prompt().items()}
        uncond = sd3.velocity(alone, latents, sigma, empty)
        expected = uncond + scale * (cond - uncond)
        torch.testing.assert_close(field(latents, sigma, conditioning), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_student_begins_as_the_base_and_its_copy_is_its_own(place):
    transformer = sd3.load_transformer(place / "model")
    layers = target_layers(transformer, sd3.LORA_TARGETS)
    shared = SharedBase(transformer, [], sd3.velocity, layers)
    student = LoraStudent(shared, layers, rank=4, alpha=8.0)
    conditioning = PreparedData(place / "cache" / "rows.jsonl", "one").condition([0, 1], [False, False])
    latents, sigma = torch.randn(2, 4, 4, 4), torch.tensor([0.8, 0.3])
    base = shared.field(-1)(latents, sigma, conditioning)
    torch.testing.assert_close(student(latents, sigma, conditioning), base)
    other = copy.deepcopy(student)
    assert other._shared[0] is shared
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.1)
    velocity = student(latents, sigma, conditioning)
    assert not torch.allclose(velocity, base)
    torch.testing.assert_close(other(latents, sigma, conditioning), base)
    velocity.square().mean().backward()
    reached = [name for name, value in student.named_parameters() if value.grad is not None and value.grad.any()]
    assert len(reached) > 0.8 * len(list(student.parameters()))  # the last block's text stream goes nowhere
    assert all(parameter.grad is None for parameter in transformer.parameters())
    merged_student = merge_into(sd3.load_transformer(place / "model"), student.lora())
    expected = sd3.velocity(merged_student, latents, sigma, conditioning.prompt)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-5)


def test_everything_missing_is_listed_at_once(place, tmp_path):
    config = config_of(place, tmp_path / "run")
    raw = config.to_dict()
    raw["capabilities"]["one"]["data"]["prepared"] = str(tmp_path / "nothing.jsonl")
    raw["capabilities"]["two"]["task"] = "edit"
    with pytest.raises(UserError, match=r"one\.data\.prepared: no prepared rows[\s\S]*two.*task is edit"):
        build_model(parse_config(raw))
    raw = config.to_dict()
    raw["sources"]["one"]["lora"] = [{"path": str(tmp_path / "gone.safetensors")}]
    raw["student"]["lora"]["targets"] = ["to_qq"]
    with pytest.raises(UserError, match=r"targets: no linear layer ends in to_qq[\s\S]*one\.lora: .*gone"):
        build_model(parse_config(raw))
    raw = config.to_dict()
    raw["model"] = str(tmp_path)
    with pytest.raises(UserError, match=r"no model_index\.json"):
        build_model(parse_config(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {"lora": {}, "init_from": "tow"}}, "did you mean 'two'"),
        ({"model": None}, "is for a model's"),
        ({"evaluation": {"times": 2}}, "evaluation.times"),
    ],
)
def test_what_does_not_go_together(place, tmp_path, change, message):
    raw = config_of(place, tmp_path / "run").to_dict()
    with pytest.raises(UserError, match=message):
        parse_config(raw | change)


def test_the_family_of_a_folder(place, tmp_path):
    assert backbone_of(place / "model") is sd3
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipelin"}))
    with pytest.raises(UserError, match="did you mean 'StableDiffusion3Pipeline'"):
        backbone_of(tmp_path)


def test_a_method_that_learns_from_pictures_needs_them(place, tmp_path):
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    lacking = tmp_path / "rows.jsonl"
    lacking.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "target_image"}) + "\n" for r in rows))
    prepare(lacking, place / "model", tmp_path / "cache", resolution=32)
    raw = config_of(place, tmp_path / "run").to_dict()
    for capability in raw["capabilities"].values():
        capability["data"]["prepared"] = str(tmp_path / "cache" / "rows.jsonl")
    build_model(parse_config(raw))
    config = parse_config({**raw, "method": "joint", "rollout": {}})
    said = "capabilities.one.data.prepared: the method learns from finished pictures, but 3 of its 3 rows have no"
    assert any(problem.startswith(said) for problem in dry_run(config, examine).problems)
    with pytest.raises(UserError) as error:
        build_model(config)
    assert said in str(error.value)
