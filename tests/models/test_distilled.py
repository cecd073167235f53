"""Bases that were distilled to a few steps: what shows them, and what does not."""

import json

import pytest

from danceopd.models.backbones import flux, flux2, qwen_image, sd3, z_image
from danceopd.models.distilled import why_distilled

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift": 3.0}


def write(folder, index=(), scheduler=(), transformer=()):
    for name, values in (
        ("model_index.json", index),
        ("scheduler/scheduler_config.json", scheduler),
        ("transformer/config.json", transformer),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(dict(values)))
    return folder


@pytest.mark.parametrize(
    ("name", "backbone", "files", "said"),
    [
        ("mine", flux2, {"index": {"is_distilled": True}}, "is_distilled in its model_index.json"),
        ("FLUX.2-klein-4B", flux2, {}, "without 'base'"),
        ("Z-Image-Turbo", z_image, {}, "'Turbo' in its name"),
        ("FLUX.1-schnell", flux, {}, "'schnell' in its name"),
        ("stable-diffusion-3.5-large-turbo", sd3, {}, "'turbo' in its name"),
        ("Qwen-Image-Lightning", qwen_image, {}, "'Lightning' in its name"),
        ("Qwen-Image-8steps", qwen_image, {}, "'8steps' in its name"),
        ("models--Tongyi-MAI--Z-Image-Turbo/snapshots/0a1b", z_image, {}, "in its name Z-Image-Turbo"),
        ("mine", z_image, {"transformer": {"_name_or_path": "/models/Z-Image-Turbo"}}, "in its name Z-Image-Turbo"),
        ("mine", qwen_image, {"index": {"sample_sigmas": [1.0, 0.75, 0.5, 0.25]}}, "4 noise levels of its own"),
        ("mine", sd3, {"scheduler": {"_class_name": "FlowMatchLCMScheduler"}}, "adds new noise after each step"),
        ("mine", sd3, {"scheduler": {"stochastic_sampling": True}}, "adds new noise after each step"),
        ("mine", flux, {"scheduler": {"shift": 1.0, "use_dynamic_shifting": False}}, "as FLUX.1 schnell's"),
        ("mine", z_image, {"scheduler": {"shift": 3.0}}, "as Z-Image-Turbo's"),
        ("mine", qwen_image, {"scheduler": DYNAMIC | {"base_shift": 1.1, "max_shift": 1.1}}, "Qwen-Image-Lightning's"),
    ],
)
def test_it_is_said_what_shows_a_distilled_base(tmp_path, name, backbone, files, said):
    assert said in why_distilled(write(tmp_path / name, **files), backbone)


@pytest.mark.parametrize(
    ("name", "backbone", "files"),
    [
        ("FLUX.2-klein-base-4B", flux2, {"index": {"is_distilled": False}, "scheduler": DYNAMIC}),
        ("my-klein", flux2, {"index": {"is_distilled": False}}),
        ("FLUX.2-klein-base-9B", flux2, {}),
        ("FLUX.2-dev", flux2, {"scheduler": DYNAMIC}),
        ("FLUX.1-dev", flux, {"scheduler": DYNAMIC}),
        ("FLUX.1-dev-de-distilled", flux, {"scheduler": DYNAMIC}),
        ("stable-diffusion-3.5-medium", sd3, {"scheduler": {"shift": 3.0}}),
        ("Z-Image", z_image, {"scheduler": {"shift": 6.0, "use_dynamic_shifting": False}}),
        ("Qwen-Image-2512", qwen_image, {"scheduler": DYNAMIC}),
        ("after-3000-steps", qwen_image, {"scheduler": DYNAMIC}),
    ],
)
def test_a_base_is_not_taken_for_a_distilled_one(tmp_path, name, backbone, files):
    assert why_distilled(write(tmp_path / name, **files), backbone) is None


def test_a_single_file_is_known_by_its_name_alone(tmp_path):
    assert "'turbo' in its name z_image_turbo_bf16.safetensors" in why_distilled(
        tmp_path / "z_image_turbo_bf16.safetensors", z_image
    )
    assert why_distilled(tmp_path / "z_image_bf16.safetensors", z_image) is None
