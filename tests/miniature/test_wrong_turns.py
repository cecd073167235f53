"""Each wrong turn of the path, put in on purpose, costs the score more than a student may lose."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Model

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import guided
from danceopd.core.schedule import sigma_grid
from danceopd.miniature.evaluate import Canvas, field_of, score_gedit, score_geneval
from danceopd.miniature.latents import tokens_of
from danceopd.miniature.shipped import PIPELINE, shipped_sources
from danceopd.models.backbones import flux2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not {"t2i", "edit"} <= set(shipped_sources()), reason="its sources have not been trained yet"),
]

KEPT = 0.95  # the pass mark of examples/journey.py

SEED, PICTURES = 4321, 25


@pytest.fixture(scope="module")
def canvas():
    return Canvas(PIPELINE)


def drawn(canvas, lora="t2i", guidance_scale=1.0):
    return score_geneval(canvas.drawer(field_of(PIPELINE, shipped_sources()[lora]), guidance_scale), SEED, PICTURES)


def edited(draw):
    return score_gedit(draw, SEED, PICTURES)["average"]


@pytest.fixture(scope="module")
def right(canvas):
    """The scores of the right way, of drawing and of editing."""
    edits = edited(canvas.drawer(field_of(PIPELINE, shipped_sources()["edit"])))
    return {"t2i": drawn(canvas)["overall"], "edit": edits}


def rescaled(path, folder, keep_alpha):
    """Writes a LoRA whose factors are 4 times smaller and whose alpha is 4 times larger, or lacks."""
    tensors = load_file(path)
    made = {key: value / 4 if "lora_B" in key else value for key, value in tensors.items()}
    if keep_alpha:
        for key, value in tensors.items():
            if "lora_A" in key:
                made[key.replace("lora_A.weight", "alpha")] = torch.tensor(4.0 * len(value))
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in made.items()}, folder / "pytorch_lora_weights.safetensors")
    return folder / "pytorch_lora_weights.safetensors"


def test_alpha_ignored(canvas, right, tmp_path):
    def overall(lora):
        return score_geneval(canvas.drawer(field_of(PIPELINE, lora)), SEED, PICTURES)["overall"]

    path = shipped_sources()["t2i"]
    assert abs(overall(rescaled(path, tmp_path / "read", True)) - right["t2i"]) < 0.02
    assert overall(rescaled(path, tmp_path / "ignored", False)) < KEPT * right["t2i"]


def test_guidance_twice(canvas):
    field, scale = field_of(PIPELINE, shipped_sources()["t2i"]), 4.0
    once = score_geneval(canvas.drawer(field, scale), SEED, PICTURES)["overall"]
    twice = guided(field, canvas.empty_prompt, scale)
    assert score_geneval(canvas.drawer(twice, scale), SEED, PICTURES)["overall"] < KEPT * once


def test_the_source_picture_in_the_place_of_the_drawn_one(canvas, right):
    transformer = field_of(PIPELINE, shipped_sources()["edit"])

    def swapped(latents, sigma, conditioning):
        source = conditioning.source
        changed = Conditioning(conditioning.prompt, latents)
        return transformer(source, sigma, changed)

    assert edited(canvas.drawer(swapped)) < KEPT * right["edit"]


@pytest.mark.parametrize("shift", [1 / 8, 30.0])
def test_another_shift_of_the_schedule(canvas, right, shift, monkeypatch):
    monkeypatch.setattr(canvas, "_sigmas", sigma_grid(16, shift=shift))
    assert drawn(canvas)["overall"] < KEPT * right["t2i"]


def test_the_layers_of_the_text_encoder_in_another_order(canvas, right, monkeypatch):
    encode = canvas._text

    def swapped(prompts):
        return {key: value.unflatten(-1, (3, -1)).flip(-2).flatten(-2) for key, value in encode(prompts).items()}

    monkeypatch.setattr(canvas, "_text", swapped)
    assert drawn(canvas)["overall"] < KEPT * right["t2i"]


def test_the_prompts_mask_does_not_reach_the_words(monkeypatch):
    """Dropping it costs nothing here: the encoder is causal and the padding stands at the end."""
    forward = Qwen3Model.forward

    def unmasked(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    prompt, encode = "a photo of a dog", flux2.text_encoder(PIPELINE, max_sequence_length=16)
    masked = encode([prompt])["prompt_embeds"]
    monkeypatch.setattr(Qwen3Model, "forward", unmasked)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    words = int(tokens_of(tokenizer, [prompt])["attention_mask"].sum())
    torch.testing.assert_close(encode([prompt])["prompt_embeds"][:, :words], masked[:, :words])
    assert words < 16
