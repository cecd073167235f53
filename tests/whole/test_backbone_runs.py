"""Every family from files to files: LoRA teachers of diffusers, prepared rows, training, plain diffusers again.

Tiny random pipelines of the real classes; where a model edits, one run mixes text to image and editing.
"""

import json
import shutil

import numpy as np
import pytest
import tiny_flux
import tiny_flux2
import tiny_qwen_image
import tiny_sd3
import tiny_z_image
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from danceopd.config.reading import parse_config
from danceopd.core.conditioning import concatenate
from danceopd.core.fields import routed
from danceopd.core.rollout import rollout_by_route
from danceopd.data.prepare import fit, prepare
from danceopd.data.prepared import PreparedData
from danceopd.models.backbones import backbone_of, pipeline_class_of
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.support.errors import UserError
from danceopd.training.assembly.build import build_model
from danceopd.training.loop import train

SIZE = 32  # pixels
STEPS = 4
EMBEDDED = 3.5

# How each family's folder is written, and how its pipeline is asked to draw (or to edit) without guidance.
UNGUIDED, KONTEXT = {"guidance_scale": 1.0}, {"max_area": SIZE**2, "_auto_resize": False}
FAMILIES = {
    "sd35": (tiny_sd3.save_tiny, UNGUIDED),
    "flux_dev": (lambda folder: tiny_flux.save_tiny(folder, pipeline="FluxPipeline"), {"guidance_scale": EMBEDDED}),
    "kontext": (tiny_flux.save_tiny, {"guidance_scale": EMBEDDED, **KONTEXT}),
    "flux2_klein": (tiny_flux2.save_tiny, UNGUIDED),
    "qwen_image": (tiny_qwen_image.save_tiny, {"true_cfg_scale": 1.0}),
    "qwen_image_edit": (lambda folder: tiny_qwen_image.save_tiny(folder, edit=True), {"true_cfg_scale": 1.0}),
    "z_image": (tiny_z_image.save_tiny, {"guidance_scale": 0.0}),
    "z_image_omni": (tiny_z_image.save_tiny_omni, {"guidance_scale": 0.0}),
}
EDITS = {"kontext", "flux2_klein", "qwen_image_edit", "z_image_omni"}
DISTILLED = {"flux_dev", "kontext"}
NEEDS_PICTURE = {"qwen_image_edit"}  # a pipeline that does not draw without one


def save_teacher(model, folder, seed):
    """A random LoRA that is far from the base, written by diffusers; those of all seeds have something in common."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    transformer = pipeline.transformer
    layers = target_layers(transformer, backbone_of(model).LORA_TARGETS)
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers))
    common, own = torch.Generator().manual_seed(10), torch.Generator().manual_seed(seed)
    for name, value in transformer.named_parameters():
        if "lora_B" in name:
            value.data = 2 * torch.randn(value.shape, generator=common) + 0.5 * torch.randn(value.shape, generator=own)
    factors = {
        name.replace(".default", ""): value for name, value in transformer.state_dict().items() if "lora_" in name
    }
    pipeline.save_lora_weights(folder, transformer_lora_layers=factors)


@pytest.fixture(scope="module", params=FAMILIES)
def place(request, tmp_path_factory):
    """(family, folder): a model, two LoRAs, and prepared rows of two capabilities, the second of edits if it edits."""
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    model = FAMILIES[family][0](root / "model")
    rng, rows = np.random.default_rng(0), []
    for m, name in enumerate(("one", "two")):
        save_teacher(model, root / name, seed=m)
    for i in range(6):
        row = {"id": str(i), "task": ("one", "two")[i % 2], "prompt": f"a picture of {'cups ' * i}"}
        if family in EDITS and i % 2:
            pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{i}.png")
            row["source_image"] = f"{i}.png"
        rows.append(row)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(root / "rows.jsonl", model, root / "cache", resolution=SIZE)
    yield family, root
    shutil.rmtree(root)


def config_of(family, root, folder, **sections):
    embedded = {"embedded_guidance": EMBEDDED} if family in DISTILLED else {}
    tasks = {"one": "t2i", "two": "edit" if family in EDITS else "t2i"}
    raw = {
        "model": str(root / "model"),
        "student": {"lora": {"rank": 4}, **embedded},
        "sources": {
            "one": {"lora": [{"path": str(root / "one")}], **embedded},
            "two": {"lora": [{"path": str(root / "two")}], "guidance_scale": 1.5, **embedded},
        },
        "capabilities": {
            name: {"source": name, "task": task, "data": {"prepared": str(root / "cache" / "rows.jsonl")}}
            for name, task in tasks.items()
        },
        "rollout": {"num_inference_steps": STEPS},
        "training": {
            "output_dir": str(folder),
            "device": "cpu",
            "max_steps": 20,
            "batch_size": 6,
            "learning_rate": 5e-2,
            "lr_schedule": "cosine",
            "warmup_steps": 1,
            "ema_decay": 0.5,
            "log_every": 1,
            "sample_every": 0,
        },
    }
    return parse_config(raw | sections)


@torch.no_grad()
def distance(config, transformer):
    """Mean square of a transformer's velocity less that of each capability's own source, at states of the sources."""
    parts, backbone = build_model(config), backbone_of(config.model)
    group, route = parts.samples.groups[0], torch.tensor([0, 0, 0, 1, 1, 1])
    batch = concatenate([data.condition([0, 1, 2], [False] * 3) for data in group.data])
    noise = torch.randn(6, *group.shape, generator=torch.Generator().manual_seed(0))
    depth = torch.tensor([[1, 3]] * 6)
    states, sigma = rollout_by_route(parts.fields, route, noise, batch, group.sigmas, depth)
    states, sigma, batch, route = states.flatten(0, 1), sigma.flatten(), batch.repeat(2), route.repeat_interleave(2)
    wanted = routed(parts.fields, route, states, sigma, batch)
    given = SharedBase(transformer, [], backbone.velocity).field(-1)
    return (given(states, sigma, batch.embedding(config.student.embedded_guidance)) - wanted).square().mean()


def test_end_to_end(place, tmp_path):
    family, root = place
    config = config_of(family, root, tmp_path / "run")
    folder = train(config, build_model)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    asked = [set(record["loss_by_capability"]) for record in records if "loss" in record]
    assert {"one", "two"} in asked  # mixed in one batch

    pipeline = DiffusionPipeline.from_pretrained(root / "model")
    pipeline.set_progress_bar_config(disable=True)
    if family == "z_image_omni":
        pipeline.vae.to(torch.bfloat16)  # as which the pipeline encodes references, whatever its own dtype
    pictures = [Image.open(root / "1.png").convert("RGB").resize((64, 64))] if family in EDITS else []

    def draw(**options):
        options |= FAMILIES[family][1] | {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE}
        return pipeline(prompt="a cup", generator=torch.Generator().manual_seed(0), output_type="np", **options).images

    asked = ([{}] if family not in NEEDS_PICTURE else []) + [{"image": pictures}] * bool(pictures)
    before = [draw(**options) for options in asked]
    far = distance(config, pipeline.transformer)
    pipeline.load_lora_weights(folder / "student")
    for options, old in zip(asked, before, strict=True):
        drawn = draw(**options)
        assert np.isfinite(drawn).all()
        assert np.abs(drawn - old).max() > 1e-3
    # What diffusers made of the file answers as the sources do.
    assert distance(config, pipeline.transformer) < 0.7 * far


def test_an_edit_needs_a_model_that_edits_and_a_distilled_one_its_number(place, tmp_path):
    family, root = place
    raw = config_of(family, root, tmp_path / "run").to_dict()
    raw["student"]["embedded_guidance"] = None if family in DISTILLED else EMBEDDED
    raw["sources"]["one"]["embedded_guidance"] = raw["student"]["embedded_guidance"]
    said = "takes its guidance as an input; give the number" if family in DISTILLED else "has no such input"
    with pytest.raises(UserError, match=rf"student\.embedded_guidance: .*{said}[\s\S]*sources\.one\.embedded_guid"):
        build_model(parse_config(raw))
    if family not in EDITS:
        raw["capabilities"]["two"]["task"] = "edit"
        with pytest.raises(UserError, match=rf"two\.task: edit, but a {pipeline_class_of(root / 'model').__name__}"):
            build_model(parse_config(raw))


def test_missing_weights_are_refused(place, tmp_path):
    _, root = place
    backbone = backbone_of(root / "model")
    loads = {"transformer": backbone.load_transformer, "vae": backbone.picture_codec}
    parts = [path.name for path in (root / "model").iterdir() if list(path.glob("*.safetensors"))]
    for part in sorted(parts):
        copy = shutil.copytree(root / "model", tmp_path / part)
        (file,) = (copy / part).glob("*.safetensors")
        weights = load_file(file)
        gone = sorted(name for name in weights if name.endswith("weight"))[-1]
        save_file({name: value for name, value in weights.items() if name != gone}, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"{part}: the weights lack"):
            loads.get(part, backbone.text_encoder)(copy)


def test_empty_prompts_see_the_picture_where_prompts_do(place):
    family, root = place
    one, two = (PreparedData(root / "cache" / "rows.jsonl", name) for name in ("one", "two"))
    batch = concatenate([one.condition([0, 1], [False, True]), two.condition([0, 1], [False, True])])
    if family not in ("qwen_image_edit", "z_image_omni"):
        assert batch.empty_prompt is None
        return
    encode = backbone_of(root / "model").text_encoder(root / "model")
    pictures = [fit(Image.open(root / f"{i}.png"), (SIZE, SIZE)) for i in (1, 3)]
    for row, shown in enumerate(([], [], *([picture] for picture in pictures))):
        wanted = encode([""], [shown])
        for name, value in wanted.items():
            own = batch.empty_prompt[name][row]
            torch.testing.assert_close(own[: value.shape[1]], value[0], rtol=1e-4, atol=1e-4)
            assert not own[value.shape[1] :].any()
            if row % 2:  # its prompt was left empty
                assert torch.equal(batch.prompt[name][row][: value.shape[1]], own[: value.shape[1]])
    assert any(not torch.equal(value[2], value[3]) for value in batch.empty_prompt.values())
