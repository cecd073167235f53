"""The miniature's weights: they ship whole and small, and plain diffusers draws with them as its field does."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from danceopd.miniature.detector import detect
from danceopd.miniature.evaluate import Canvas, field_of, t2i_set
from danceopd.miniature.scene import render
from danceopd.miniature.scores import geneval_correct
from danceopd.miniature.shipped import PIPELINE
from danceopd.models.backbones import flux2
from danceopd.support.paths import MINIATURE

LIMIT = 20 * 2**20  # bytes of all weights


@pytest.fixture(scope="module")
def canvas():
    return Canvas(PIPELINE)


def test_all_of_it_is_small_and_in_half_precision():
    files = list(MINIATURE.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= LIMIT
    for file in files:
        dtypes = {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()}
        assert dtypes == {torch.bfloat16}, file


def test_plain_diffusers_draws_as_the_field_does(canvas):
    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(PIPELINE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(3))
    options = {"max_sequence_length": 16, "height": 64, "width": 64, "num_inference_steps": 16, "output_type": "pt"}
    prompt = "a photo of a clock"
    drawn = pipeline(prompt=prompt, latents=noise, guidance_scale=1.0, **options).images
    ours = canvas.draw(field_of(PIPELINE), [prompt], None, 3)
    torch.testing.assert_close(drawn * 2 - 1, ours, atol=0.01, rtol=0)


def test_the_vae_gives_pictures_back():
    encode, decode = flux2.picture_codec(PIPELINE)
    prompts, scene = t2i_set(5, 4)
    true = render(scene)
    with torch.inference_mode():
        again = decode(encode(true)).clamp(-1, 1)
    assert float((10 * torch.log10(4 / (again - true).square().mean((1, 2, 3)))).mean()) > 33
    assert geneval_correct(prompts, detect(again)).float().mean() > 0.95


def test_the_base_draws_much_of_what_it_is_asked_for(canvas):
    prompts, _ = t2i_set(6, 8)
    right = geneval_correct(prompts, detect(canvas.draw(field_of(PIPELINE), [p.text for p in prompts], None, 6)))
    assert 0.2 < float(right.float().mean()) < 0.65
