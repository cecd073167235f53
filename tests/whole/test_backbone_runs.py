"""Every family from files to files: LoRA teachers of diffusers, prepared rows, training, plain diffusers again.

Tiny random pipelines of the real classes; where a model edits, one run mixes text to image and editing.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from model_runs import EDITING, PREPARED_SIZE, losses, plain_pipeline, teachers_config
from PIL import Image
from safetensors.torch import load_file, save_file

from danceopd.api import distill
from danceopd.config.reading import parse_config
from danceopd.core.conditioning import concatenate
from danceopd.core.fields import routed
from danceopd.core.rollout import rollout_by_route
from danceopd.data.prepare import fit
from danceopd.data.prepared import PreparedData
from danceopd.models.backbones import backbone_of, pipeline_class_of
from danceopd.models.loading import transformer_folder
from danceopd.models.lora_files import loads_loras
from danceopd.models.shared_base import SharedBase
from danceopd.support.errors import UserError
from danceopd.tools.export import export
from danceopd.training.assembly.build import build_model

SIZE = PREPARED_SIZE
STEPS = 4
EMBEDDED = 3.5

# How each family's pipeline is asked to draw (or to edit) without guidance.
UNGUIDED, KONTEXT = {"guidance_scale": 1.0}, {"max_area": SIZE**2, "_auto_resize": False}
DRAWING = {
    "sd3": UNGUIDED,
    "flux": {"guidance_scale": EMBEDDED},
    "kontext": {"guidance_scale": EMBEDDED, **KONTEXT},
    "klein": UNGUIDED,
    "qwen": {"true_cfg_scale": 1.0},
    "qwen_edit": {"true_cfg_scale": 1.0},
    "z": {"guidance_scale": 0.0},
    "z_omni": {"guidance_scale": 0.0},
    "qwen_21": {"output_resolution": SIZE},
    "longcat": {"guidance_scale": 1.0, "enable_prompt_rewrite": False},
    "longcat_edit": UNGUIDED,
    "krea2": {"guidance_scale": 0.0},
    "prx": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "dreamlite": {"guidance_scale": 1.0, "image_guidance_scale": 1.0},
    "flux3": {"output": "images"},
}
DISTILLED = {"flux", "kontext"}
NEEDS_PICTURE = {"qwen_edit", "longcat_edit"}  # pipelines that do not draw without one
SEE_PICTURES = {"qwen_edit", "z_omni", "qwen_21", "longcat_edit", "dreamlite"}  # with their text encoders


@pytest.fixture(params=DRAWING)
def place(request, prepared_places):
    """(family, folder): a model, two LoRAs, and prepared rows of two capabilities, the second of edits if it edits."""
    return request.param, prepared_places(request.param)


def config_of(family, root, folder):
    changes = {"capabilities.two.task": "edit" if family in EDITING else "t2i", "rollout.num_inference_steps": STEPS}
    if family in DISTILLED:
        changes |= {f"{key}.embedded_guidance": EMBEDDED for key in ("student", "sources.one", "sources.two")}
    training = {"device": "cpu", "batch_size": 6, "learning_rate": 5e-2, "lr_schedule": "cosine"}
    changes |= {f"training.{key}": value for key, value in training.items()}
    return teachers_config(root, folder, guidance=1.5, **changes)


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
    wanted = routed(parts.fields, route, states, sigma, batch).target()
    given = SharedBase(transformer, [], backbone.velocity).field(-1)
    return (given(states, sigma, batch.embedding(config.student.embedded_guidance)) - wanted).square().mean()


def test_end_to_end(place, tmp_path):
    family, root = place
    config = config_of(family, root, tmp_path / "run")
    folder = distill(config)
    curve = losses(folder)
    assert len(curve) == 20
    assert sum(curve[-5:]) < 0.7 * sum(curve[:5])
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    asked = [set(record["loss_by_capability"]) for record in records if "loss" in record]
    assert {"one", "two"} in asked  # mixed in one batch

    pipeline = plain_pipeline(root / "model")
    if family == "z_omni":
        pipeline.vae.to(torch.bfloat16)  # as which the pipeline encodes references, whatever its own dtype
    pictures = [Image.open(root / "1.png").convert("RGB").resize((64, 64))] if family in EDITING else []

    def draw(**options):
        options |= DRAWING[family] | {"num_inference_steps": STEPS}
        if family != "longcat_edit":  # which takes its size from the picture
            options |= {"height": SIZE, "width": SIZE}
        drawn = pipeline(prompt="a cup", generator=torch.Generator().manual_seed(0), output_type="np", **options)
        return drawn if family == "flux3" else drawn.images

    asked = ([{}] if family not in NEEDS_PICTURE else []) + [{"image": pictures}] * bool(pictures)
    network = getattr(pipeline, transformer_folder(root / "model").name)
    before = [draw(**options) for options in asked]
    far = distance(config, network)
    if loads_loras(type(pipeline)):
        pipeline.load_lora_weights(folder / "student")
    elif family == "prx":  # diffusers gives its transformer no adapters
        merged = export(folder, tmp_path / "merged", merge=True)
        network = pipeline.transformer = type(network).from_pretrained(merged)
    else:
        network.load_lora_adapter(str(folder / "student"), weight_name="pytorch_lora_weights.safetensors")
    for options, old in zip(asked, before, strict=True):
        drawn = draw(**options)
        assert np.isfinite(drawn).all()
        assert np.abs(drawn - old).max() > 1e-3
    # What diffusers made of the file answers as the sources do.
    assert distance(config, network) < 0.7 * far


def test_an_edit_needs_a_model_that_edits_and_a_distilled_one_its_number(place, tmp_path):
    family, root = place
    raw = config_of(family, root, tmp_path / "run").to_dict()
    raw["student"]["embedded_guidance"] = None if family in DISTILLED else EMBEDDED
    raw["sources"]["one"]["embedded_guidance"] = raw["student"]["embedded_guidance"]
    said = "takes its guidance as an input; give the number" if family in DISTILLED else "has no such input"
    with pytest.raises(UserError, match=rf"student\.embedded_guidance: .*{said}[\s\S]*sources\.one\.embedded_guid"):
        build_model(parse_config(raw))
    if family not in EDITING:
        raw["capabilities"]["two"]["task"] = "edit"
        with pytest.raises(UserError, match=rf"two\.task: edit, but a {pipeline_class_of(root / 'model').__name__}"):
            build_model(parse_config(raw))


def test_missing_weights_are_refused(place, tmp_path):
    _, root = place
    backbone = backbone_of(root / "model")
    loads = {"vae": backbone.picture_codec}
    loads |= dict.fromkeys(("transformer", "unet"), backbone.load_transformer)
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
    if family not in SEE_PICTURES:
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
