"""The dry run: what it counts is what a run loads, keeps and asks, and it opens no weights."""

import copy
import json
import re
import shutil
from importlib.util import find_spec

import pytest
import safetensors
import torch
import yaml
from model_runs import EMBEDDED, FAMILIES, SIZE, config_of
from released import prompt_of
from safetensors.torch import load_file, save_file

import danceopd.data.cache
import danceopd.models.backbones
import danceopd.models.tensor_files
import danceopd.world.files
from danceopd.api import builder_of, examiner_of
from danceopd.cli.parser import main
from danceopd.config.reading import load_config, parse_config
from danceopd.core.conditioning import Conditioning
from danceopd.core.query import QUERIES, expected_depth, query
from danceopd.models.backbones import backbone_of
from danceopd.models.loading import check_weights
from danceopd.models.lora_files import load_lora
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import LoraStudent
from danceopd.planning import dry_run as planning
from danceopd.support.errors import UserError
from danceopd.support.optimizers import adamw_class, make_optimizers
from danceopd.training.assembly.networks import student_layers
from danceopd.training.loop import Trainer

# ------------------------------------------------------------------------------------------------- counting


def build(config):
    return builder_of(config)(config)


def dry_run(config):
    return planning.dry_run(config, examiner_of(config))


def refuse_weights(monkeypatch, root):
    """Of the model no weight can be read, and of LoRAs a tensor at a time."""
    real = safetensors.safe_open

    def opened(path, *args, **kwargs):
        assert "model" not in str(path), f"{path} was opened"
        return real(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", opened)
    for module in (danceopd.models.tensor_files, danceopd.data.cache, danceopd.world.files):
        monkeypatch.setattr(module, "safe_open", opened)
    monkeypatch.setattr("safetensors.torch.load_file", lambda path, *_, **__: pytest.fail(f"{path} was loaded"))


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_loaded_modules_and_no_weight_is_opened(places, family, monkeypatch):
    root, asked = places(family), EMBEDDED.get(family, {})
    with monkeypatch.context() as patched:
        refuse_weights(patched, root)
        plan = dry_run(config_of(root, **asked))
    assert plan.problems == []
    if asked:
        assert [problem.split(":")[0] for problem in dry_run(config_of(root)).problems] == [
            "sources.one.embedded_guidance",
            "sources.two.embedded_guidance",
            "student.embedded_guidance",
        ]
    backbone = backbone_of(root / "model")
    transformer = backbone.load_transformer(root / "model")
    numel = sum(p.numel() for p in transformer.parameters())
    assert plan.parameters["base"] == numel
    pipeline = danceopd.models.backbones.pipeline_class_of(root / "model")
    for name in ("one", "two"):
        lora = load_lora(root / f"{name}.safetensors", transformer, pipeline)
        expected = sum(a.numel() + b.numel() for a, b, _ in lora.values())
        assert plan.parameters[f"source {name}, beside the base"] == expected
    layers = student_layers(config_of(root), backbone, transformer)
    student = LoraStudent(SharedBase(transformer, [], backbone.velocity, layers), layers, 4, 4.0)
    trainable = sum(p.numel() for p in student.parameters())
    assert plan.parameters["student, trainable"] == trainable
    sizes = {name: size for name, (size, _) in plan.memory.items()}
    assert sizes["base weights"] >= 4 * numel
    assert (
        sizes["student"] == sizes["gradient"] == sizes["average (EMA)"] == sizes["optimizer state"] / 2 == 4 * trainable
    )
    assert 0 < plan.activations[1] < plan.activations[0] == sizes["forward and backward"]


def test_half_the_bytes_in_bf16_and_the_options_of_the_estimate(places):
    root = places("sd3")
    plain = dry_run(config_of(root))
    half = dry_run(config_of(root, **{"training.precision": "bf16", "training.gradient_checkpointing": True}))
    assert half.memory["base weights"][0] == plain.memory["base weights"][0] / 2
    assert half.memory["student"] == plain.memory["student"]
    assert half.memory["forward and backward"][0] == half.activations[1]
    assert half.evaluations["student, forward again"] == half.evaluations["student, forward"]
    more = dry_run(config_of(root, **{"training.batch_size": 8, "query.k": 2}))
    assert more.activations[0] == pytest.approx(4 * plain.activations[0], rel=0.01)
    split = dry_run(config_of(root, **{"training.batch_size": 8, "training.gradient_accumulation_steps": 2}))
    assert split.activations == plain.activations
    muon = dry_run(config_of(root, **{"training.optimizer": "muon"}))
    assert muon.memory["optimizer state"][0] == plain.memory["optimizer state"][0] / 2  # factors are matrices


# ---------------------------------------------------------------------------------------------- evaluations


@pytest.mark.parametrize("bias", QUERIES)
@pytest.mark.parametrize("k", [1, 3])
def test_the_expected_depth_is_the_mean_of_what_is_drawn(bias, k):
    drawn = query(40000, 16, torch.Generator().manual_seed(0), bias=bias, k=k).amax(1).double()
    assert expected_depth(16, bias=bias, k=k) == pytest.approx(float(drawn.mean()), abs=5 * float(drawn.std()) / 200)


def test_an_exact_count_by_hand(places):
    """Two steps and k = 2: both states are asked, the deeper after one step; Heun takes two forwards a step."""
    changes = {
        "rollout.num_inference_steps": 2,
        "rollout.solver": "heun",
        "query.bias": "uniform",
        "query.k": 2,
        "capabilities.one.weight": 3.0,
        "capabilities.one.student_guidance_scale": 2.0,
        "sources.two.guidance_scale": 4.0,
    }
    plan = dry_run(config_of(places("sd3"), **changes))
    own, asked = 1.75, 1.25  # three quarters of the samples are guided by the student, one quarter by their source
    assert plan.evaluations == {
        "rollout to the deepest state asked": pytest.approx(4 * 2 * own),
        "source": pytest.approx(4 * 2 * asked),
        "student, forward": pytest.approx(4 * 2 * own),
        "student, backward": pytest.approx(4 * 2 * own * 2),
    }
    soft = dry_run(config_of(places("sd3"), **changes, **{"options.routing": "soft"}))
    assert soft.evaluations["source"] == 4 * 2 * 3
    assert dry_run(config_of(places("sd3"), method="sds")).evaluations is None


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_real_run_asks_as_often(places, tmp_path, guidance):
    """The rows that the transformer itself is given, and the run's own counter."""
    changes = {
        "query.k": 2,
        "training.batch_size": 16,
        "rollout.solver": "heun",
        "sources.one.guidance_scale": guidance,
        "capabilities.two.student_guidance_scale": guidance,
        "capabilities.two.weight": 2.0,
        "training.output_dir": str(tmp_path),
    }
    config = config_of(places("sd3"), **changes)
    trainer = Trainer(config, build(config))
    rows, steps = [], 12
    transformer = trainer.parts.student._shared[0].transformer
    transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    for _ in range(steps):
        trainer.update()
    expected = dry_run(config).evaluations
    forwards = sum(value for name, value in expected.items() if name != "student, backward")
    assert sum(rows) / steps == pytest.approx(forwards, rel=0.08)
    if guidance == 1:
        assert trainer.evaluations.total() / steps == pytest.approx(sum(expected.values()), rel=0.08)


def test_the_embedded_network(tmp_path, capsys):
    override = [f"training.output_dir={tmp_path / 'run'}", "training.batch_size=16", "query.k=2"]
    config = load_config("configs/demo.yaml", override)
    plan = dry_run(config)
    assert plan.problems == []
    trainer = Trainer(config, build(config))
    assert plan.parameters["student, trainable"] == sum(p.numel() for p in trainer.parts.student.parameters())
    half = config.training.max_steps // 2  # where the warm start ends
    for step in (0, 1, 2, 3, 4, half, half + 1, half + 2, half + 3, half + 4):
        trainer.step = step
        trainer.update()
    assert trainer.evaluations.total() / 10 == pytest.approx(sum(plan.evaluations.values()), rel=0.08)
    states = [s for optimizer in trainer.engine.optimizers for s in optimizer.state.values()]
    state = sum(v.nbytes for s in states for v in s.values() if v.numel() > 1)
    assert plan.memory["optimizer state"][0] == pytest.approx(state, rel=1e-3)
    assert main(["train", "--config", "configs/demo.yaml", "--dry-run", f"training.output_dir={tmp_path / 'no'}"]) == 0
    assert "student, trainable" in capsys.readouterr().out
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------ what is missing


def test_all_that_is_missing_is_listed_and_the_rest_is_printed(places, tmp_path, capsys):
    raw = config_of(places("sd3")).to_dict()
    model = tmp_path / "model"
    shutil.copytree(places("sd3") / "model", model)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(model / "text_encoder")
    other = tmp_path / "other.safetensors"
    save_file({"transformer.blocks.0.lora_A.weight": torch.zeros(2, 4)}, other)
    raw["model"] = str(model)
    raw["sources"]["one"]["lora"] = [{"path": str(tmp_path / "gone.safetensors")}, {"path": str(other)}]
    raw["sources"]["three"] = {"weights": str(tmp_path / "nowhere")}
    raw["capabilities"]["two"]["data"]["prepared"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--dry-run"]) == 2
    out = capsys.readouterr().out
    for line in (
        r"capabilities\.two\.data\.prepared: no prepared rows at .*gone\.jsonl",
        r"model: no weights diffusion_pytorch_model\.safetensors in",
        r"sources\.one\.lora: .*gone\.safetensors: no LoRA there",
        r"sources\.one\.lora: .*other\.safetensors: cannot",
        r"sources\.three\.weights: there is no folder .*nowhere; give a transformer's folder or its safetensors file",
        r"needed by `danceopd data prepare` alone: text_encoder",
        r"student, trainable +\d",
        r"rollout to the deepest state asked +\d",
        r"at least: without activations",
    ):
        assert re.search(line, out), (line, out)


def test_no_model_at_all_still_names_the_rest(places, tmp_path):
    raw = config_of(places("sd3")).to_dict()
    raw["model"] = str(tmp_path)
    raw["sources"]["one"]["lora"] = [{"path": str(tmp_path / "gone.safetensors")}]
    raw["capabilities"]["two"]["data"]["prepared"] = str(tmp_path / "gone.jsonl")
    plan = dry_run(parse_config(raw))
    assert [problem.split(":")[0] for problem in plan.problems] == [
        "model",
        "capabilities.two.data.prepared",
        "sources.one.lora",
    ]
    assert plan.evaluations


def test_shards_that_are_missing_are_named(places, tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(places("sd3") / "model" / "transformer", folder)
    check_weights(folder)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / names[0]).write_bytes(b"")
    with pytest.raises(UserError, match="no weights diffusion_pytorch_model-00002-of-00002"):
        check_weights(folder)


def test_a_shard_that_the_index_does_not_name_is_named(places, tmp_path):
    folder = tmp_path / "transformer"
    transformer = backbone_of(places("sd3") / "model").load_transformer(places("sd3") / "model")
    transformer.save_pretrained(folder, max_shard_size="60KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = max(content["weight_map"].values())
    content["weight_map"] = {key: file for key, file in content["weight_map"].items() if file != last}
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"lack \d+ tensors, .* the index does not name {last}, which lies there"):
        check_weights(folder, transformer)


def test_the_share_of_a_source_outside_of_the_students_adapter_is_said(places):
    root = places("sd3")
    assert not [line for line in dry_run(config_of(root)).warnings if "adapter lacks" in line]
    plan = dry_run(config_of(root, **{"student.lora.targets": ["attn.to_q", "attn.to_k"]}))
    assert plan.problems == []
    for name in ("one", "two"):
        (line,) = [line for line in plan.warnings if line.startswith(f"sources.{name}:")]
        tensors = load_file(root / f"{name}.safetensors")
        norms = {
            key.removesuffix(".lora_A.weight"): (tensors[key.replace("lora_A", "lora_B")] @ a).double().square().sum()
            for key, a in tensors.items()
            if "lora_A" in key
        }
        lacking = [layer for layer in norms if not layer.endswith(("attn.to_q", "attn.to_k"))]
        share = sum(norms[layer] for layer in lacking) / sum(norms.values())
        assert f"{share:.1%} of its change (squared norm) is in {len(lacking)} layers" in line
        assert "widen student.lora.targets" in line
    every = dry_run(config_of(root, **{"student.lora.targets": "all-linear"}))
    assert not [line for line in every.warnings if "adapter lacks" in line]


def test_a_fused_layer_of_zeros_is_no_change(places, tmp_path):
    up = torch.ones(3 * 16, 2)
    up[2 * 16 :] = 0  # of to_v
    name = "transformer.transformer_blocks.0.attn.to_qkv"
    save_file({f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": up}, tmp_path / "q.safetensors")
    one = {"lora": [{"path": str(tmp_path / "q.safetensors")}]}
    plan = dry_run(config_of(places("sd3"), **{"sources.one": one, "student.lora.targets": ["attn.to_q", "attn.to_k"]}))
    assert plan.problems == []
    assert not [line for line in plan.warnings if line.startswith("sources.one:")]


def test_presets_and_patterns_are_in_the_plan(places):
    root = places("sd3")
    small = dry_run(config_of(root, **{"student.lora.targets": "attention", "student.lora.rank": 4}))
    large = dry_run(
        config_of(root, **{"student.lora.targets": "attention+ffn", "student.lora.rank_pattern": {"net.2": 9}})
    )
    assert small.parameters["student, trainable"] < large.parameters["student, trainable"]
    none = dry_run(config_of(root, **{"student.lora.targets": []}))
    assert none.problems == ["student.lora.targets: it names no layer; leave it out for the family's usual ones"]
    wrong = dry_run(config_of(root, **{"student.lora.alpha_pattern": {"to_w": 1.0}}))
    assert wrong.problems == ["student.lora: no layer of the adapter ends in to_w, which a pattern names"]


def test_weights_of_another_model_of_equal_shapes_are_warned_of(places, tmp_path):
    root = places("sd3")
    transformer = backbone_of(root / "model").load_transformer(root / "model")
    generator = torch.Generator().manual_seed(7)
    for share, warned in ((0.1, False), (1.0, True)):  # fine-tuned, and drawn anew
        changed = copy.deepcopy(transformer)
        for value in changed.parameters():
            noise = torch.randn(value.shape, generator=generator) * value.std(correction=0)
            value.data = (1 - share) * value + share * noise
        changed.save_pretrained(tmp_path / str(share))
        plan = dry_run(config_of(root, **{"sources.two": {"weights": str(tmp_path / str(share))}}))
        assert plan.problems == []
        assert any("by shape alone" in line and "sources.two.weights" in line for line in plan.warnings) == warned


def test_a_lora_that_names_another_base_is_warned_of(places, tmp_path):
    root = places("sd3")
    model = tmp_path / "models--org--base" / "snapshots" / "0"
    model.parent.mkdir(parents=True)
    shutil.copytree(root / "model", model)
    for base, warned in (("org/base", False), ("org/edit", True)):
        save_file(load_file(root / "one.safetensors"), tmp_path / "one.safetensors", metadata={"base_model": base})
        config = config_of(
            root, model=str(model), **{"sources.one": {"lora": [{"path": str(tmp_path / "one.safetensors")}]}}
        )
        said = [line for line in dry_run(config).warnings if "trained on org/edit, and the model is org/base" in line]
        assert bool(said) == warned


# ------------------------------------------------------------------------ gradient checkpointing, 8-bit AdamW


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_checkpointing_are_those_without(places, family):
    root = places(family)
    backbone = backbone_of(root / "model")
    shape = backbone.latent_shape(root / "model", SIZE, SIZE)
    torch.manual_seed(0)
    latents, sigma = torch.randn(2, *shape), torch.tensor([0.8, 0.3])
    results = []
    for checkpointed in (False, True):
        transformer = backbone.load_transformer(root / "model")
        layers = target_layers(transformer, backbone.LORA_TARGETS, every=False)
        lora = load_lora(
            root / "one.safetensors", transformer, danceopd.models.backbones.pipeline_class_of(root / "model")
        )
        shared = SharedBase(transformer, [lora], guided_velocity(backbone), layers)
        if checkpointed:
            shared.enable_gradient_checkpointing()
        student = LoraStudent(shared, layers, 4, 8.0, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for value in student.parameters():
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        torch.manual_seed(3)
        prompt = {n: v.expand(2, *v.shape) for n, v in prompt_of(family, transformer).items()}
        conditioning = Conditioning(prompt, None, torch.tensor([False, False]))
        velocity = student(latents, sigma, conditioning)
        teacher = shared.field(0)(latents, sigma, conditioning)  # the route has moved on before the backward
        (velocity - teacher).square().mean().backward()
        results.append((velocity.detach(), {name: p.grad for name, p in student.named_parameters()}))
    (plain, expected), (again, grads) = results
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert sum(value is not None and bool(value.any()) for value in grads.values()) > len(grads) / 2
    for name, value in grads.items():
        if expected[name] is None:
            assert value is None
        else:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def guided_velocity(backbone):
    return lambda transformer, latents, sigma, prompt, sources, _guidance: backbone.velocity(
        transformer, latents, sigma, prompt, sources, 3.5
    )


def test_a_run_with_checkpointing_is_the_run_without(places, tmp_path):
    weights = []
    for checkpointed in (False, True):
        changes = {"training.gradient_checkpointing": checkpointed, "training.output_dir": str(tmp_path)}
        config = config_of(places("sd3"), **changes)
        trainer = Trainer(config, build(config))
        for _ in range(2):
            trainer.update()
        weights.append([p.detach().clone() for p in trainer.parts.student.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_adamw_of_8_bits_needs_its_library(places):
    if not any(map(find_spec, ("bitsandbytes", "torchao"))):
        with pytest.raises(UserError, match=r"pip install 'danceopd\[8bit\]'"):
            adamw_class("adamw_8bit")
        with pytest.raises(UserError, match=r"training\.optimizer: adamw_8bit needs bitsandbytes or torchao"):
            build(config_of(places("sd3"), **{"training.optimizer": "adamw_8bit"}))
    else:
        model = torch.nn.Linear(64, 64)
        (optimizer,) = make_optimizers(model, "adamw_8bit", 1e-2, 0.0)
        before = model.weight.detach().clone()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model.weight, before)
    plan = dry_run(config_of(places("sd3"), **{"training.optimizer": "adamw_8bit"}))
    assert plan.memory["optimizer state"][0] == 2 * plan.parameters["student, trainable"]


def test_a_distilled_base_is_warned_of_unless_it_is_allowed(places, tmp_path):
    root = places("klein")
    model = shutil.copytree(root / "model", tmp_path / "FLUX.2-klein-4B")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    config = config_of(root, model=str(model))
    plan = dry_run(config)
    assert plan.problems == []
    (line,) = plan.warnings
    assert line.startswith(f"model: {model} was distilled to a few steps (is_distilled in its model_index.json)")
    assert "a rollout of 4 steps leaves the path" in line
    assert "Take FLUX.2-klein-base-4B" in line
    assert f"warning: {line}" in plan.text()
    assert build(config).warnings == (line,)
    allowed = config_of(root, model=str(model), allow_distilled_base=True)
    assert dry_run(allowed).warnings == []
    assert build(allowed).warnings == ()
    assert dry_run(config_of(root)).warnings == []


def test_a_source_of_distilled_weights_is_warned_of(places, tmp_path):
    root = places("sd3")
    other = shutil.copytree(root / "other", tmp_path / "sd3.5_large_turbo")
    changes = {"sources.one": {"weights": str(other)}}
    (line,) = dry_run(config_of(root, **changes)).warnings
    assert line.startswith(f"sources.one.weights: {other} was distilled to a few steps ('turbo' in its name")
