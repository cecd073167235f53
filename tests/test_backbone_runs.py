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

from danceopd.backbones import backbone_of
from danceopd.conditioning import concatenate
from danceopd.config import parse_config
from danceopd.data.prepare import prepare
from danceopd.fields import routed
from danceopd.lora import SharedBase, target_layers
from danceopd.training.loop import train
from danceopd.training.setup import build

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
    """A random LoRA that is far from the base, written by diffusers."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    transformer = pipeline.transformer
    layers = target_layers(transformer, backbone_of(model).LORA_TARGETS)
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
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
    prepare(root / "rows.jsonl", model, root / "cache", backbone_of(model), resolution=SIZE)
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
            "two": {"lora": [{"path": str(root / "two")}], "guidance_scale": 2.0, **embedded},
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
            "learning_rate": 2e-2,
            "warmup_steps": 1,
            "ema_decay": 0.5,
            "log_every": 1,
            "sample_every": 0,
        },
    }
    return parse_config(raw | sections)


@torch.no_grad()
def distance(config, family, root, transformer):
    """Mean square of a transformer's velocity less that of each capability's own source, on samples of both."""
    parts, backbone = build(config), backbone_of(config.model)
    group = parts.samples.groups[0]
    batch = concatenate([data.condition([0, 1, 2], [False] * 3) for data in group.data])
    generator = torch.Generator().manual_seed(0)
    latents, sigma = torch.randn(6, *group.shape, generator=generator), torch.linspace(0.2, 0.9, 6)
    wanted = routed(parts.fields, torch.tensor([0, 0, 0, 1, 1, 1]), latents, sigma, batch)
    asked = batch.embedding(config.student.embedded_guidance)
    return (SharedBase(transformer, [], backbone.velocity).field(-1)(latents, sigma, asked) - wanted).square().mean()


def test_end_to_end(place, tmp_path):
    family, root = place
    config = config_of(family, root, tmp_path / "run")
    folder = train(config)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for name in ("one", "two"):
        curve = [r["loss_by_capability"][name] for r in records if name in r.get("loss_by_capability", {})]
        assert sum(curve[-5:]) < 0.7 * sum(curve[:5]), (name, curve)

    pipeline = DiffusionPipeline.from_pretrained(root / "model")
    pipeline.set_progress_bar_config(disable=True)
    pictures = [Image.open(root / "1.png").convert("RGB")] if family in EDITS else []

    def draw(**options):
        options |= FAMILIES[family][1] | {"num_inference_steps": STEPS, "height": SIZE, "width": SIZE}
        return pipeline(prompt="a cup", generator=torch.Generator().manual_seed(0), output_type="np", **options).images

    asked = ([{}] if family not in NEEDS_PICTURE else []) + [{"image": pictures}] * bool(pictures)
    before = [draw(**options) for options in asked]
    far = distance(config, family, root, pipeline.transformer)
    pipeline.load_lora_weights(folder / "student")
    for options, old in zip(asked, before, strict=True):
        drawn = draw(**options)
        assert np.isfinite(drawn).all()
        assert np.abs(drawn - old).max() > 1e-3
    # What diffusers made of the file answers as the sources do.
    assert distance(config, family, root, pipeline.transformer) < 0.5 * far
