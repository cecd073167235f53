"""Export: what the plain pipeline of diffusers draws with the written files is what the student itself draws."""

import hashlib
import importlib
import json
import resource
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_flux
import tiny_sd3
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors import safe_open

from danceopd.api import distill
from danceopd.cli.parser import main
from danceopd.config.reading import parse_config
from danceopd.core.conditioning import Conditioning
from danceopd.core.rollout import sample
from danceopd.data.prepare import prepare
from danceopd.miniature.shipped import PIPELINE
from danceopd.models.backbones import FAMILIES, backbone_of, empty_transformer, pipeline_class_of
from danceopd.models.loading import hub_id
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import FILES, add_metadata, load_lora, save_lora
from danceopd.models.lora_layouts import layouts_of
from danceopd.models.shared_base import target_layers
from danceopd.support.errors import UserError
from danceopd.support.files import new_folder, write_atomic
from danceopd.tools.export import export, stored_dtype
from danceopd.tools.provenance import base_name
from danceopd.training.assembly.build import build_model
from danceopd.training.checkpoints import load_newest
from danceopd.training.loop import Trainer
from danceopd.training.resume import go_on

SIZE, STEPS, PROMPT = 32, 3, "a red cup"


def train_tiny(root, save, **pipeline):
    """A run of a few updates whose student is far from the base."""
    model = save(root / "model", **pipeline)
    pipeline_class = pipeline_class_of(model)
    teacher = pipeline_class.from_pretrained(model)
    teacher.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "add_k_proj"]))
    state = {k.replace(".default", ""): v for k, v in teacher.transformer.state_dict().items() if "lora_" in k}
    generator = torch.Generator().manual_seed(0)
    state = {key: 0.5 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
    teacher.save_lora_weights(root / "teacher", transformer_lora_layers=state)
    rows = [{"id": str(i), "task": "style", "prompt": f"{PROMPT} {i}"} for i in range(3)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(root / "rows.jsonl", model, root / "cache", resolution=SIZE)
    config = parse_config(
        {
            "model": str(model),
            "student": {"lora": {"rank": 3, "alpha": 1.5}},
            "sources": {"style": {"lora": [{"path": str(root / "teacher")}]}},
            "capabilities": {"style": {"source": "style", "task": "t2i", "data": {"prepared": str(prepared.path)}}},
            "rollout": {"num_inference_steps": STEPS},
            "training": {
                "output_dir": str(root / "run"),
                "max_steps": 3,
                "batch_size": 2,
                "learning_rate": 0.1,
                "warmup_steps": 1,
                "ema_decay": 0.0,
                "log_every": 1,
                "sample_every": 0,
            },
        }
    )
    return distill(config), config


@pytest.fixture(scope="module")
def sd3_run(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("sd3"), tiny_sd3.save_tiny)


@pytest.fixture(scope="module")
def flux_run(tmp_path_factory):
    kind = {"pipeline": "FluxPipeline", "guidance_embeds": False}
    return train_tiny(tmp_path_factory.mktemp("flux"), tiny_flux.save_tiny, **kind)


@torch.no_grad()
def student_picture(config, noise):
    """[H, W, 3] in [0, 1]: the student of the newest checkpoint, in our own sampler."""
    backbone, parts = backbone_of(config.model), build_model(config)
    trainer = Trainer(config, parts)
    go_on(trainer, load_newest(config.training.output_dir / "checkpoints")[0])
    prompt = backbone.text_encoder(config.model)([PROMPT])
    conditioning = Conditioning(prompt, None, torch.tensor([False]))
    sigmas = backbone.sigmas(config.model, STEPS, SIZE, SIZE)
    latents = sample(trainer.engine.ema.module, noise, conditioning, sigmas)
    return (backbone.picture_codec(config.model)[1](latents)[0].permute(1, 2, 0).numpy() + 1) / 2


def pipeline_picture(pipeline, noise):
    if isinstance(pipeline, diffusers.FluxPipeline):
        noise = pipeline._pack_latents(noise, 1, noise.shape[1], *noise.shape[-2:])
    options = {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE, "output_type": "np"}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, guidance_scale=1.0, latents=noise, **options).images[0]


def check_pictures(run, config, tmp_path, pipeline_class):
    backbone = backbone_of(config.model)
    noise = torch.randn(1, *backbone.latent_shape(config.model, SIZE, SIZE), generator=torch.Generator().manual_seed(3))
    expected = student_picture(config, noise)
    base = pipeline_class.from_pretrained(config.model)
    assert np.abs(pipeline_picture(base, noise) - expected).max() > 0.02
    base.load_lora_weights(export(run, tmp_path / "lora"))
    np.testing.assert_allclose(pipeline_picture(base, noise), expected, atol=1e-4)
    whole = type(base.transformer).from_pretrained(export(run, tmp_path / "whole", merge=True))
    merged = pipeline_class.from_pretrained(config.model, transformer=whole)
    np.testing.assert_allclose(pipeline_picture(merged, noise), expected, atol=1e-4)


def test_sd3_draws_the_students_pictures(sd3_run, tmp_path):
    check_pictures(*sd3_run, tmp_path, StableDiffusion3Pipeline)


def test_flux_draws_the_students_pictures(flux_run, tmp_path):
    run, config = flux_run
    check_pictures(run, config, tmp_path, diffusers.FluxPipeline)
    # A file for ComfyUI too, by diffusers' own reader, which takes kohya's fused layers at FLUX's real size alone.
    export(run, tmp_path / "comfyui", layout="comfyui")
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    pictures = []
    for folder in ("lora", "comfyui"):
        pipeline = diffusers.FluxPipeline.from_pretrained(config.model)
        pipeline.load_lora_weights(tmp_path / folder)
        pictures.append(pipeline_picture(pipeline, noise))
    np.testing.assert_allclose(pictures[1], pictures[0], atol=1e-5)


def fake_student(run, tmp_path, model):
    """The run's folder with an adapter of another model in its place."""
    backbone, empty = backbone_of(model), empty_transformer(model)
    generator, lora = torch.Generator().manual_seed(1), {}
    for name in target_layers(empty, [t for t in backbone.LORA_TARGETS if "single" not in t]):
        out, width = empty.get_submodule(name).weight.shape
        lora[name] = (torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator), 1.0)
    folder = tmp_path / f"run_{model.name}"
    save_lora(lora, folder / "student", pipeline_class_of(model))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "model": str(model)}))
    return folder


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "prx"])
def test_layouts_of_every_family(sd3_run, tmp_path, family):
    """Each reads back as the same change of the same layers; of PEFT's by PEFT itself."""
    model = importlib.import_module(f"tiny_{family}").save_tiny(tmp_path / family)
    run = fake_student(sd3_run[0], tmp_path, model)
    expected = load_lora(run / "student", empty_transformer(model), pipeline_class_of(model))
    for layout in ("diffusers", "peft", "comfyui", "kohya"):
        output = tmp_path / f"{family}_{layout}"
        if layout not in layouts_of(family):
            with pytest.raises(UserError, match=f"no tool is known that reads the {layout} layout of {family}; use"):
                export(run, output, layout=layout)
            assert not output.exists()
            continue
        export(run, output, layout=layout, dtype="bf16", triggers=["in ink"])
        (file,) = output.glob("*.safetensors")
        back = load_lora(file, empty_transformer(model), pipeline_class_of(model))
        assert back.keys() == expected.keys()
        for name, (a, b, scale) in back.items():
            other_a, other_b = (part.bfloat16().float() for part in expected[name][:2])
            torch.testing.assert_close(scale * b @ a, other_b @ other_a)
        with safe_open(file, framework="pt") as opened:
            assert {opened.get_slice(key).get_dtype() for key in opened.keys() if ".alpha" not in key} == {"BF16"}  # noqa: SIM118
            assert opened.metadata()["base_model"] == model.name
            assert opened.metadata()["trigger_words"] == "in ink"
        if layout == "peft":
            transformer = backbone_of(model).load_transformer(model)
            merged = PeftModel.from_pretrained(transformer, output).merge_and_unload()
            fresh = merge_into(backbone_of(model).load_transformer(model), back)
            for one, other in zip(merged.parameters(), fresh.parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_files_metadata_names_base_triggers_and_sources(sd3_run, tmp_path):
    run, config = sd3_run
    teacher = config.sources["style"].lora[0].path / FILES[1]
    digest = hashlib.sha256(teacher.read_bytes()).hexdigest()
    for layout in ("diffusers", "peft", "kohya"):
        (file,) = export(run, tmp_path / layout, layout=layout, triggers=["ink"]).glob("*.safetensors")
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        assert json.loads(metadata["sources"]) == {"style": {"teacher": f"sha256:{digest}"}}
        assert metadata["modelspec.trigger_phrase"] == metadata["trigger_words"] == "ink"
        assert str(run.parent) not in json.dumps(metadata)


def test_words_that_are_given_stand_in_place_of_the_sources_own(sd3_run, tmp_path):
    run, config = sd3_run
    file = config.sources["style"].lora[0].path / FILES[1]
    before = file.read_bytes()
    add_metadata(file, {"trigger_words": "old words"})
    try:
        for i, (given, expected) in enumerate((((), "old words"), (("in ink",), "in ink"))):
            (written,) = export(run, tmp_path / str(i), triggers=given).glob("*.safetensors")
            with safe_open(written, framework="pt") as opened:
                assert opened.metadata()["trigger_words"] == expected
            assert f"Words that call it in a prompt: {expected}." in (tmp_path / str(i) / "README.md").read_text()
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8"])
def test_a_merged_transformer_of_any_storage_is_read_by_diffusers(sd3_run, tmp_path, dtype):
    run, config = sd3_run
    output = export(run, tmp_path / dtype, merge=True, dtype=dtype)
    kinds = {"fp16": {"F16"}, "bf16": {"BF16"}, "fp8": {"BF16", "F8_E4M3"}}[dtype]
    (file,) = output.glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == kinds  # noqa: SIM118
        assert opened.metadata()["base_model"]
    whole = diffusers.SD3Transformer2DModel.from_pretrained(output, dtype=torch.float32)
    exact = diffusers.SD3Transformer2DModel.from_pretrained(config.model / "transformer")
    merge_into(exact, load_lora(run / "student", exact, StableDiffusion3Pipeline))
    bits = {"fp16": 10, "bf16": 7, "fp8": 3}[dtype]
    for one, other in zip(whole.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-bits, atol=2.0**-9 if dtype == "fp8" else 1e-4)


def test_the_card(sd3_run, tmp_path):
    run, _ = sd3_run
    scores = {
        "rows": [{"name": "base", "geneval": {"overall": 0.7}}, {"name": "danceopd", "geneval": {"overall": 0.8}}]
    }
    (run / "results.json").write_text(json.dumps(scores))
    try:
        text = (export(run, tmp_path / "lora") / "README.md").read_text()
    finally:
        (run / "results.json").unlink()
    card = ModelCard(text)
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert "lora" in card.data.tags
    assert card.data.base_model is None  # a folder of no known repository
    assert "| style | t2i | 3 | teacher | 1 | 1 |" in text
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [record["loss"] for record in records if "loss" in record][-1]
    assert f"| 3 | {last:.4g} | {last:.4g} |" in text
    assert "0.800" in text
    assert str(run.parent) not in text
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["student"]["lora"] == {
        "rank": 3,
        "alpha": 1.5,
        "targets": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init": "uniform",
    }
    merged = ModelCard((export(run, tmp_path / "whole", merge=True) / "README.md").read_text())
    assert merged.data.base_model_relation == "finetune"
    assert "## Scores" not in merged.text


def test_the_hub_repository_of_a_folder(tmp_path):
    folder = tmp_path / "models--stabilityai--stable-diffusion-3.5-medium" / "snapshots" / "0"
    folder.mkdir(parents=True)
    assert hub_id(folder) == "stabilityai/stable-diffusion-3.5-medium"
    for named, expected in (("org/name", "org/name"), ("/data/org/name", None), (str(tmp_path), None), ("", None)):
        (tmp_path / "model_index.json").write_text(json.dumps({"_name_or_path": named}))
        assert hub_id(tmp_path) == expected


def test_a_merge_keeps_the_stored_dtype_and_makes_no_copy(sd3_run, tmp_path):
    run, config = sd3_run
    half = tmp_path / "half"
    StableDiffusion3Pipeline.from_pretrained(config.model, dtype=torch.bfloat16).save_pretrained(half)
    assert stored_dtype(half / "transformer") == torch.bfloat16
    other = tmp_path / "run"
    (other / "student").mkdir(parents=True)
    file = "student/pytorch_lora_weights.safetensors"
    (other / file).write_bytes((run / file).read_bytes())
    raw = yaml.safe_load((run / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**raw, "model": str(half)}))
    assert stored_dtype(export(other, tmp_path / "whole", merge=True)) == torch.bfloat16
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(config.model / "transformer")
    places = {name: value.data_ptr() for name, value in transformer.named_parameters()}
    merge_into(transformer, load_lora(run / "student", transformer, StableDiffusion3Pipeline))
    assert places == {name: value.data_ptr() for name, value in transformer.named_parameters()}


def test_what_cannot_be_exported(sd3_run, tmp_path, capsys):
    run, config = sd3_run
    with pytest.raises(UserError, match="holds no run"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="stored in fp32, bf16 or fp16; fp8 is for --merge"):
        export(run, tmp_path / "out", dtype="fp8")
    with pytest.raises(UserError, match="leave out --layout"):
        export(run, tmp_path / "out", merge=True, layout="kohya")
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="train first"):
        export(tmp_path, tmp_path / "out")
    gone = {**config.to_dict(), "model": str(tmp_path / "gone")}
    (tmp_path / "student").mkdir()
    file = "student/pytorch_lora_weights.safetensors"
    (tmp_path / file).write_bytes((run / file).read_bytes())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(gone))
    with pytest.raises(UserError, match="there is no folder"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 0
    assert main(["export", str(run), "-o", str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_folder_is_whole_or_not_there(tmp_path):
    def fail_halfway():
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "whole").read_text() == "x"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_full_disk_is_said_and_leaves_what_was_there(sd3_run, tmp_path):
    run, config = sd3_run
    shutil.copytree(run / "student", tmp_path / "student")
    before = (tmp_path / "student" / FILES[1]).read_bytes()
    lora = load_lora(run / "student", empty_transformer(config.model), StableDiffusion3Pipeline)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may grow longer: the same error, on any machine
    try:
        with pytest.raises(UserError, match=r"cannot write .*student.*make room"):
            save_lora(lora, tmp_path / "student", StableDiffusion3Pipeline)
        with pytest.raises(UserError, match=r"cannot write .*whole.*make room"):
            export(run, tmp_path / "whole", merge=True)
        with pytest.raises(OSError, match="long"):
            write_atomic(tmp_path / "long", bytes(3000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "student" / FILES[1]).read_bytes() == before
    assert sorted(p.name for p in tmp_path.rglob("*")) == [FILES[1], "student"]


def test_what_ships_is_named_as_it_is_asked_for(tmp_path):
    assert base_name(Path("miniature")) == base_name(PIPELINE) == "miniature"
    own = shutil.copytree(PIPELINE, tmp_path / "my-model")
    assert base_name(own) == "my-model"
