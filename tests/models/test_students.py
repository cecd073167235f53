"""Students of a diffusers model: all weights, and what either kind of student begins as."""

import json
from copy import deepcopy

import numpy as np
import pytest
import tiny_flux2
import tiny_sd3
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from model_runs import EMBEDDED, SIZE, losses, write_lora, write_rows
from model_runs import config_of as family_config
from released import prompt_of
from torch import nn

from danceopd.api import distill
from danceopd.cli.parser import main
from danceopd.config.reading import parse_config
from danceopd.core.conditioning import Conditioning
from danceopd.core.rollout import sample
from danceopd.data.prepared import PreparedData
from danceopd.models import saving
from danceopd.models.backbones import backbone_of, flux2, sd3
from danceopd.models.lora_algebra import merge_into, truncated
from danceopd.models.lora_files import load_lora
from danceopd.models.saving import save_transformer
from danceopd.models.shared_base import target_layers
from danceopd.models.students import FullStudent
from danceopd.models.weights import of_tensors
from danceopd.planning.dry_run import dry_run
from danceopd.planning.models import examine
from danceopd.support.errors import UserError
from danceopd.tools.export import export, stored_dtype
from danceopd.training.assembly.build import build_model
from danceopd.training.checkpoints import load_newest
from danceopd.training.loop import Trainer
from danceopd.training.resume import go_on

OWN = {"own": {"weights": "own"}, "other": {"weights": "other"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, LoRAs of ranks 2 and 3 on different layers, two transformers of their own, prepared rows."""
    root = tmp_path_factory.mktemp("students")
    model = tiny_sd3.save_tiny(root / "model")
    transformer = sd3.load_transformer(model)
    torch.manual_seed(0)
    for rank, name, targets in ((2, "one", ["to_q", "to_v"]), (3, "two", ["to_q", "to_out.0"])):
        write_lora(root / f"{name}.safetensors", transformer, target_layers(transformer, targets), rank)
    write_rows(root / "cache", "sd3", transformer, sd3.latent_shape(model, SIZE, SIZE), {"one": "t2i", "two": "t2i"})
    for name in ("own", "other"):
        changed = deepcopy(transformer)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        changed.save_pretrained(root / name)
    return root


def config_of(root, folder, sources=None, student=None, **training):
    """Without `sources` the two LoRAs."""
    sources = sources or {name: {"lora": [{"path": f"{name}.safetensors"}]} for name in ("one", "two")}
    for source in (sources := deepcopy(sources)).values():
        source |= {"weights": str(root / source["weights"])} if source.get("weights") else {}
        source["lora"] = [{**lora, "path": str(root / lora["path"])} for lora in source.get("lora", [])]
    names = list(sources)
    raw = {
        "model": str(root / "model"),
        "student": student or {},
        "sources": sources,
        "capabilities": {
            name: {"source": source, "task": "t2i", "data": {"prepared": str(root / "cache" / "rows.jsonl")}}
            for name, source in (("one", names[0]), ("two", names[-1]))
        },
        "rollout": {"num_inference_steps": 3},
        "training": {
            "output_dir": str(folder),
            "max_steps": 10,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "warmup_steps": 1,
            "ema_decay": 0.5,
            "log_every": 1,
            "sample_every": 0,
            **training,
        },
    }
    return parse_config(raw)


def asked(root):
    """(latents, sigma, conditioning) of two samples."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, *sd3.latent_shape(root / "model", SIZE, SIZE), generator=generator)
    return (
        latents,
        torch.tensor([0.9, 0.4]),
        PreparedData(root / "cache" / "rows.jsonl", "one").condition([0, 1], [False, False]),
    )


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- all weights


@pytest.fixture(scope="module")
def full_run(place, tmp_path_factory):
    sources = {"own": {"weights": "own"}}
    config = config_of(place, tmp_path_factory.mktemp("full") / "run", sources, learning_rate=5e-3)
    return distill(config), config


@torch.no_grad()
def test_end_to_end(full_run, place, tmp_path):
    run, config = full_run
    curve = losses(run)
    assert len(curve) == 10
    assert sum(curve[-3:]) < 0.5 * sum(curve[:3])
    trainer = Trainer(config, build_model(config))
    go_on(trainer, load_newest(run / "checkpoints")[0])
    prompt = sd3.text_encoder(place / "model")(["a red cup"])
    noise = torch.randn(1, *sd3.latent_shape(place / "model", SIZE, SIZE), generator=torch.Generator().manual_seed(3))
    sigmas = sd3.sigmas(place / "model", 3, SIZE, SIZE)
    expected = sample(trainer.engine.ema.module, noise, Conditioning(prompt, None, torch.tensor([False])), sigmas)

    def drawn(transformer):
        pipeline = StableDiffusion3Pipeline.from_pretrained(place / "model", transformer=transformer)
        pipeline.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": SIZE, "width": SIZE}
        return pipeline("a red cup", latents=noise.clone(), output_type="latent", **options).images

    for merge in (False, True):
        folder = export(run, tmp_path / str(merge), merge)
        close(drawn(SD3Transformer2DModel.from_pretrained(folder)), expected, 1e-4)
        assert "base_model_relation: finetune" in (folder / "README.md").read_text()
    close(drawn(SD3Transformer2DModel.from_pretrained(run / "student")), expected, 1e-4)
    assert (drawn(sd3.load_transformer(place / "model")) - expected).abs().max() > 1e-2
    assert main(["export", str(run), "-o", str(tmp_path / "x"), "--layout", "kohya"]) == 2
    with pytest.raises(UserError, match="trained all weights; comfyui is a layout of adapters"):
        export(run, tmp_path / "x", layout="comfyui")
    assert not (tmp_path / "x").exists()


def test_a_students_folder_is_a_source_and_a_half_base_makes_a_half_export(full_run, place, tmp_path):
    run, _ = full_run
    sources = {"before": {"weights": str(run / "student")}, "one": {"lora": [{"path": "one.safetensors"}]}}
    parts = build_model(config_of(place, tmp_path / "next", sources, {"init_from": "before"}))
    x = asked(place)
    close(parts.student(*x), parts.fields[0](*x))
    half = tmp_path / "half"
    StableDiffusion3Pipeline.from_pretrained(place / "model", dtype=torch.bfloat16).save_pretrained(half)
    other = tmp_path / "run"
    other.mkdir()
    (other / "student").symlink_to(run / "student")
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(place / "model"), str(half)))
    assert stored_dtype(export(other, tmp_path / "out")) == torch.bfloat16


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "gradient_checkpointing": True, "optimizer": "muon"}])
def test_resumed_is_uninterrupted(place, tmp_path, changes):
    whole = distill(config_of(place, tmp_path / "whole", max_steps=3, **changes))
    distill(config_of(place, tmp_path / "parts", max_steps=2, **changes))
    parts = distill(config_of(place, tmp_path / "parts", max_steps=3, **changes))
    a, b = (load_newest(folder / "checkpoints")[0] for folder in (whole, parts))
    assert a.step == b.step == 3
    assert a.shapes == b.shapes
    assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.shapes)
    base = sd3.load_transformer(place / "model").state_dict()
    trained = [n for n in base if f"student/transformer.{n}" in a.shapes]  # a table of positions is no parameter
    changed = [n for n in trained if not torch.equal(base[n], a.tensor(f"student/transformer.{n}"))]
    assert len(changed) > 0.95 * (len(base) - 1)  # but for the table of positions, and what only the last text sees
    x, first, again = asked(place), *(sd3.load_transformer(folder / "student") for folder in (whole, parts))
    with torch.no_grad():
        assert torch.equal(*(sd3.velocity(t, *x[:2], x[2].prompt) for t in (first, again)))


def test_its_copy_is_its_own_and_the_teachers_stay(place, tmp_path):
    parts, x = build_model(config_of(place, tmp_path)), asked(place)
    base = sd3.velocity(sd3.load_transformer(place / "model"), *x[:2], x[2].prompt).detach()
    teachers = [field(*x) for field in parts.fields]
    close(parts.student(*x), base)
    other = deepcopy(parts.student)
    with torch.no_grad():
        for value in parts.student.parameters():
            value.add_(0.05)
    assert not torch.allclose(parts.student(*x), base, atol=1e-2)
    close(other(*x), base)
    for field, before in zip(parts.fields, teachers, strict=True):
        assert torch.equal(field(*x), before)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parts.student.parameters())


def test_checkpointing_changes_no_gradient_and_bf16_runs_in_bf16(place, tmp_path):
    x, grads = asked(place), []
    for options in ({}, {"gradient_checkpointing": True}):
        student = build_model(config_of(place, tmp_path, **options)).student.train()
        student(*x).square().mean().backward()
        grads.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    half = build_model(config_of(place, tmp_path, precision="bf16")).student
    seen = []
    half.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    answer, exact = half(*x), student(*x)
    assert seen == [torch.bfloat16]
    assert answer.dtype == torch.float32
    assert 0 < (answer - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("family", ["flux", "klein", "qwen", "z"])
def test_every_family_is_trained_in_bf16(places, family):
    """An answer near float32's, a gradient for all that the picture depends on, and a plan."""
    root = places(family)
    backbone = backbone_of(root / "model")
    transformer = backbone.load_transformer(root / "model")
    guidance = 3.5 if getattr(transformer.config, "guidance_embeds", False) else None
    exact = FullStudent(transformer, backbone.velocity, guidance)
    half = FullStudent(deepcopy(transformer), backbone.velocity, guidance, torch.bfloat16)
    half.transformer.enable_gradient_checkpointing()
    torch.manual_seed(0)
    prompt = {name: value.expand(2, *value.shape) for name, value in prompt_of(family, transformer).items()}
    latents = torch.randn(2, *backbone.latent_shape(root / "model", SIZE, SIZE))
    x = latents, torch.tensor([0.9, 0.4]), Conditioning(prompt, None, torch.tensor([False, False]))
    expected, answer = exact(*x), half.train()(*x)
    assert answer.dtype == torch.float32
    assert 0 < (answer - expected).abs().max() < 0.1 * expected.abs().max()
    for velocity in (expected, answer):
        velocity.square().mean().backward()
    for a, b in zip(exact.parameters(), half.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in half.parameters()) > 0.8 * len(
        list(half.parameters())
    )
    changes = {"student": {}, "training.precision": "bf16", "training.gradient_checkpointing": True}
    changes |= EMBEDDED.get(family, {})
    plan = dry_run(family_config(root, **changes), examine)
    assert plan.problems == []
    assert 0 < plan.activations[1] < plan.activations[0]


def test_samples_with_and_without_sources_are_two_forwards(tmp_path):
    model = tiny_flux2.save_tiny(tmp_path / "model")
    transformer = backbone_of(model).load_transformer(model)
    student = FullStudent(transformer, flux2.velocity)
    shape = flux2.latent_shape(model, 32, 32)
    torch.manual_seed(0)
    prompt = {name: value.expand(3, *value.shape) for name, value in prompt_of("klein", transformer).items()}
    latents, sigma, source = torch.randn(3, *shape), torch.rand(3), torch.randn(3, *shape)
    rows = []
    transformer.register_forward_pre_hook(lambda _, args, kw: rows.append(len(kw["hidden_states"])), with_kwargs=True)
    mixed = student(latents, sigma, Conditioning(prompt, source, torch.tensor([True, False, True])))
    assert rows == [2, 1]
    edited = student(latents, sigma, Conditioning(prompt, source, torch.tensor([True] * 3)))
    drawn = student(latents, sigma, Conditioning(prompt, None, torch.tensor([False] * 3)))
    close(mixed, torch.stack([edited[0], drawn[1], edited[2]]))
    mixed.square().mean().backward()
    assert transformer.x_embedder.weight.grad.any()


def test_the_base_is_kept_only_for_who_needs_it(place, tmp_path, monkeypatch):
    loaded, real = [], sd3.load_transformer
    monkeypatch.setattr(sd3, "load_transformer", lambda f, d=torch.float32: loaded.append((str(f), d)) or real(f, d))
    config = config_of(place, tmp_path, OWN, {"init_from": "own"}, precision="bf16")
    parts = build_model(config)
    own, other = str(place / "own"), str(place / "other")
    assert loaded == [(own, torch.bfloat16), (other, torch.bfloat16)]  # the student is read from own's files
    plan = dry_run(config, examine)
    assert "base" not in plan.parameters
    assert "base weights" not in plan.memory
    assert plan.problems == []
    assert len(parts.fields) == 2
    assert "base weights" in dry_run(config_of(place, tmp_path), examine).memory


def test_a_process_that_dies_leaves_the_old_or_the_new_one(place, tmp_path, monkeypatch):
    """Killed before each step of writing that changes the folder."""
    old, new = sd3.load_transformer(place / "own"), sd3.load_transformer(place / "other")
    folder = tmp_path / "student"
    monkeypatch.setattr(saving, "SHARD", 80_000)  # bytes: several

    class Killed(BaseException):
        pass

    def dying(real, left):  # left: how many of these steps it lives to see
        def step(*args, **kwargs):
            if not left:
                raise Killed
            left.pop()
            return real(*args, **kwargs)

        return step

    steps = [(saving.os, "replace"), (saving, "write_atomic"), (saving.shutil, "rmtree")]
    outcomes = set()
    for number in range(60):
        save_transformer(old, of_tensors(old.state_dict()), folder)
        left = [None] * number
        with monkeypatch.context() as patched:
            for module, name in steps:
                patched.setattr(module, name, dying(getattr(module, name), left))
            try:
                save_transformer(new, of_tensors(new.state_dict()), folder)
                whole = True
            except Killed:
                whole = False
        found = SD3Transformer2DModel.from_pretrained(folder).state_dict()
        is_new = [torch.equal(value, new.state_dict()[name]) for name, value in found.items()]
        is_old = [torch.equal(value, old.state_dict()[name]) for name, value in found.items()]
        assert all(is_new) or all(is_old)
        outcomes.add((whole, all(is_new)))
        if whole:
            break
    assert outcomes == {(False, False), (False, True), (True, True)}
    files = {file.name for file in folder.iterdir()}
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert files == {"config.json", "diffusion_pytorch_model.safetensors.index.json", *index["weight_map"].values()}


# -------------------------------------------------------------------------------------------- where it begins


@pytest.mark.parametrize("lora", [None, {"rank": 5, "alpha": 2.0}])
@pytest.mark.parametrize("start", ["one", "two", "merge"])
def test_it_begins_as_its_source(place, tmp_path, start, lora):
    """Of rank 5 an adapter holds the mean of ranks 2 and 3 exactly."""
    student = {"init_from": start, **({"lora": lora} if lora else {})}
    config = config_of(place, tmp_path, student=student)
    assert dry_run(config, examine).problems == []
    parts, x = build_model(config), asked(place)
    if start == "merge":
        transformer = sd3.load_transformer(place / "model")
        loras = [load_lora(place / f"{n}.safetensors", transformer, StableDiffusion3Pipeline) for n in ("one", "two")]
        halves = [{name: (a, b, scale / 2) for name, (a, b, scale) in lora.items()} for lora in loras]
        expected = sd3.velocity(
            merge_into(merge_into(deepcopy(transformer), halves[0]), halves[1]), *x[:2], x[2].prompt
        )
    else:
        expected = parts.fields[["one", "two"].index(start)](*x)
    close(parts.student(*x), expected)
    base = sd3.velocity(sd3.load_transformer(place / "model"), *x[:2], x[2].prompt)
    assert (parts.student(*x) - base).abs().max() > 1e-2


def test_what_is_left_of_the_rank_can_be_trained(place, tmp_path):
    student = build_model(config_of(place, tmp_path, student={"init_from": "one", "lora": {"rank": 5}})).student
    a, b = student.factors_of("transformer_blocks.0.attn.to_q")
    assert b[:, :2].all()
    assert not b[:, 2:].any()
    assert a.all()
    assert a[2:].abs().max() <= a.shape[1] ** -0.5
    student(*asked(place)).square().mean().backward()
    assert b.grad[:, 2:].any()


def test_a_smaller_rank_takes_the_best_of_it(place, tmp_path):
    config = config_of(place, tmp_path, student={"init_from": "two", "lora": {"rank": 2, "alpha": 3.0}})
    plan = dry_run(config, examine)
    assert any(line.startswith("student: begins as two, cut to rank 2 in") for line in plan.found)
    lora = build_model(config).student.lora()
    transformer = sd3.load_transformer(place / "model")
    theirs = load_lora(place / "two.safetensors", transformer, StableDiffusion3Pipeline)
    for name, (a, b, scale) in theirs.items():
        u, s, vh = torch.linalg.svd(scale * b @ a, full_matrices=False)
        own_a, own_b, own_scale = lora[name]
        close(own_scale * own_b @ own_a, (u[:, :2] * s[:2]) @ vh[:2])


@pytest.mark.parametrize("repeats", [1, 3])
def test_truncation_by_the_small_product(repeats):
    """Wider than a layer, and of a true rank below the asked one: nothing of it is rounding alone."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((4, 6), (9, 4)))
    small_a, small_b = truncated(a.repeat(repeats, 1), b.repeat(1, repeats), 0.5, 5)
    assert len(small_a) == small_b.shape[1] == 4
    close(small_b @ small_a, 0.5 * repeats * b @ a)


def test_full_students_from_weights(place, tmp_path):
    x = asked(place)
    parts = build_model(config_of(place, tmp_path, OWN, {"init_from": "other"}))
    close(parts.student(*x), parts.fields[1](*x))
    sources = {**OWN, "plain": {}, "one": {"lora": [{"path": "one.safetensors", "scale": 2.0}]}}
    config = config_of(place, tmp_path, sources, {"init_from": "merge"})
    assert dry_run(config, examine).problems == []
    student = build_model(config).student
    base = sd3.load_transformer(place / "model")
    lora = load_lora(place / "one.safetensors", base, StableDiffusion3Pipeline, 2.0)
    networks = [base, merge_into(deepcopy(base), lora), *(sd3.load_transformer(place / name) for name in OWN)]
    values = [dict(network.named_parameters()) for network in networks]
    for name, parameter in student.transformer.named_parameters():
        close(parameter, sum(v[name] for v in values) / 4)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"init_from": "onee"}, "init_from: no source 'onee', nor base or merge; did you mean 'one'"),
        ({"init_from": "own", "lora": {}}, "own has weights of its own.*leave student.lora out.*distil"),
        ({"init_from": "merge", "lora": {}}, "own has weights of its own"),
    ],
)
def test_what_it_cannot_begin_as(place, tmp_path, student, message):
    sources = {"one": {"lora": [{"path": "one.safetensors"}]}, "own": {"weights": "own"}}
    with pytest.raises(UserError, match=message):
        config_of(place, tmp_path, sources, student)


def test_a_source_called_merge(place, tmp_path):
    sources = {"merge": {"lora": [{"path": "one.safetensors"}]}}
    with pytest.raises(UserError, match="one of them has this name too"):
        config_of(place, tmp_path, sources, {"init_from": "merge"})


def test_layers_that_the_student_has_not_are_named(place, tmp_path):
    config = config_of(place, tmp_path, student={"init_from": "two", "lora": {"rank": 4, "targets": ["to_q"]}})
    message = r"student\.init_from: two changes transformer_blocks\.0\.attn\.to_out\.0.* which student\.lora\.targets"
    with pytest.raises(UserError, match=message):
        build_model(config)
    assert [p for p in dry_run(config, examine).problems if p.startswith("student.init_from: two changes")]


def test_transformers_that_differ_have_no_mean(place, tmp_path):
    tiny_sd3.save_tiny(tmp_path / "deep", num_layers=3)
    sources = {"own": {"weights": "own"}, "deep": {"weights": str(tmp_path / "deep")}}
    config = config_of(place, tmp_path / "run", sources, {"init_from": "merge"})
    message = r"student\.init_from: source own and source deep differ in shape \(.*begin as base"
    with pytest.raises(UserError, match=message):
        build_model(config)
    assert len(dry_run(config, examine).problems) == 1


def test_missing_weights_are_named(place, tmp_path):
    config = config_of(place, tmp_path / "run", {"own": {"weights": "gone"}}, {"init_from": "own"})
    with pytest.raises(UserError, match=r"sources\.own\.weights: [\s\S]*gone"):
        build_model(config)
    assert any(p.startswith("sources.own.weights: ") for p in dry_run(config, examine).problems)


# --------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_counts_a_full_student(place, tmp_path, precision):
    config = config_of(place, tmp_path / "run", precision=precision)
    plan = dry_run(config, examine)
    assert plan.problems == []
    numel = sum(p.numel() for p in sd3.load_transformer(place / "model").parameters())
    assert plan.parameters["student, trainable"] == plan.parameters["base"] == numel
    sizes = {name: size for name, (size, _) in plan.memory.items()}
    assert sizes["student"] == sizes["average (EMA)"] == sizes["optimizer state"] / 2 == 4 * numel
    assert 0 <= sizes["gradient"] <= 4 * numel  # what of it is not there before activations go
    parts = config_of(place, tmp_path / "run", precision=precision, gradient_accumulation_steps=2)
    assert dry_run(parts, examine).memory["gradient"][0] == 4 * numel
    assert sizes.get("student in bfloat16") == (2 * numel if precision == "bf16" else None)
    assert plan.activations[1] < plan.activations[0]


def test_muon_is_for_the_products_over_tokens(place, tmp_path):
    trainer = Trainer(config := config_of(place, tmp_path, optimizer="muon"), build_model(config_of(place, tmp_path)))
    muon, adamw = trainer.engine.optimizers
    names = {id(p): name for name, p in trainer.parts.student.transformer.named_parameters()}
    chosen = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    assert "transformer_blocks.0.attn.to_q.weight" in chosen
    trained = trainer.parts.student.transformer
    assert all(isinstance(trained.get_submodule(n.rpartition(".")[0]), nn.Linear) for n in chosen)
    assert not any("norm" in name or "embed" in name for name in chosen)
    assert len(chosen) + sum(len(g["params"]) for g in adamw.param_groups) == len(names)
    plan = dry_run(config, examine)
    state = 4 * sum(p.numel() for g in muon.param_groups for p in g["params"])
    rest = 8 * sum(p.numel() for g in adamw.param_groups for p in g["params"])
    assert plan.memory["optimizer state"][0] == state + rest
    assert np.isfinite(trainer.update()["loss"])
