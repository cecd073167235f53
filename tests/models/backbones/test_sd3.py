"""Stable Diffusion 3: the same pictures as diffusers' own pipeline, from the same folder and the same noise."""

import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_sd3 import save_tiny

from danceopd.models.backbones import sd3
from danceopd.support.errors import UserError

PROMPTS = ["a red cube", "Two blue balls, left of a box"]
HEIGHT, WIDTH, STEPS = 32, 48, 4


@pytest.fixture(scope="session")
def sd35(tmp_path_factory):
    """SD3.5-medium's kind: a second attention in the first block, and normed queries and keys."""
    return save_tiny(tmp_path_factory.mktemp("sd35"))


@pytest.fixture(scope="session")
def sd30(tmp_path_factory):
    """SD3-medium's kind, with neither; without T5, and with a shift that depends on the picture's size."""
    full = save_tiny(tmp_path_factory.mktemp("full"), seed=1, dual_attention_layers=(), qk_norm=None)
    folder = tmp_path_factory.mktemp("sd30")
    pipe = StableDiffusion3Pipeline.from_pretrained(full, text_encoder_3=None, tokenizer_3=None)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_shift=1.3)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(params=["sd35", "sd30"])
def folder(request):
    return request.getfixturevalue(request.param)


def pipeline(folder):
    # Of a folder saved without T5 the pipeline wants to be told so again.
    t5 = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **t5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(folder, n=2, height=HEIGHT, width=WIDTH):
    return torch.randn(n, *sd3.latent_shape(folder, height, width), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def sample(folder, latents, prompts, scale=1.0, height=HEIGHT, width=WIDTH):
    """Euler, with the empty prompt's velocity mixed in where scale is not 1."""
    encode, transformer = sd3.text_encoder(folder), sd3.load_transformer(folder)
    cond, uncond = encode(prompts), encode([""] * len(prompts))
    grid = sd3.sigmas(folder, STEPS, height, width)
    for now, after in pairwise(grid):
        v = sd3.velocity(transformer, latents, now.expand(len(latents)), cond)
        if scale != 1:
            empty = sd3.velocity(transformer, latents, now.expand(len(latents)), uncond)
            v = empty + scale * (v - empty)
        latents = latents + (after - now) * v
    return latents


def assert_close(ours, theirs):
    """Within 1e-5 of the values' size."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_equals_the_pipeline(folder, scale):
    start, pipe = noise(folder), pipeline(folder)
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "guidance_scale": scale}
    theirs = pipe(PROMPTS, latents=start, output_type="latent", **options).images
    ours = sample(folder, start, PROMPTS, scale)
    assert_close(ours, theirs)
    pictures = pipe(PROMPTS, latents=start, output_type="pt", **options).images
    _, decode = sd3.picture_codec(folder)
    assert_close(decode(ours) / 2 + 0.5, pictures)
    # It would be no proof if neither the prompt nor the guidance changed anything.
    assert (ours[0] - sample(folder, start, PROMPTS[::-1], scale)[0]).abs().max() > 1e-3
    assert (ours - sample(folder, start, PROMPTS, scale + 1)).abs().max() > 1e-3


@torch.no_grad()
def test_text_equals_the_pipeline(folder):
    prompts = [*PROMPTS, "", "x" * 100, "y z " * 100]  # also longer than the CLIPs, and than T5, can read
    theirs, _, pooled, _ = pipeline(folder).encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    ours = sd3.text_encoder(folder)(prompts)
    assert ours["prompt_embeds"].shape == (5, 77 + 256, 40)
    assert_close(ours["prompt_embeds"], theirs)
    assert_close(ours["pooled_prompt_embeds"], pooled)


def test_without_t5_its_tokens_are_zeros(sd30, sd35):
    assert not sd3.text_encoder(sd30)(PROMPTS)["prompt_embeds"][:, 77:].any()
    assert sd3.text_encoder(sd35)(PROMPTS)["prompt_embeds"][:, 77:].any()


@pytest.mark.parametrize(("height", "width"), [(32, 48), (128, 128)])
def test_sigmas_equal_the_pipelines(folder, height, width):
    pipe = pipeline(folder)
    pipe(PROMPTS[0], height=height, width=width, num_inference_steps=3, output_type="latent")
    ours = sd3.sigmas(folder, 3, height, width)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, pipe.scheduler.sigmas)
    assert ours[0] == 1
    assert ours[-1] == 0


def test_dynamic_shift_depends_on_the_size(sd30, sd35):
    assert not torch.equal(sd3.sigmas(sd30, 3, 32, 48), sd3.sigmas(sd30, 3, 128, 128))
    assert torch.equal(sd3.sigmas(sd35, 3, 32, 48), sd3.sigmas(sd35, 3, 128, 128))


@torch.no_grad()
def test_a_batch_equals_each_sample_alone(folder):
    transformer, prompt, latents = sd3.load_transformer(folder), sd3.text_encoder(folder)(PROMPTS), noise(folder)
    sigma = torch.tensor([0.9, 0.2])
    both = sd3.velocity(transformer, latents, sigma, prompt)
    for i in range(2):
        row = {name: value[i : i + 1] for name, value in prompt.items()}
        assert_close(both[i : i + 1], sd3.velocity(transformer, latents[i : i + 1], sigma[i : i + 1], row))
    assert (both - sd3.velocity(transformer, latents, sigma.flip(0), prompt)).abs().max() > 1e-3


def test_velocity_trains_every_lora_target(sd35):
    transformer, latents = sd3.load_transformer(sd35), noise(sd35)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, target_modules=list(sd3.LORA_TARGETS), init_lora_weights="gaussian"))
    prompt = sd3.text_encoder(sd35)(PROMPTS)
    sd3.velocity(transformer, latents, torch.tensor([0.9, 0.2]), prompt).square().mean().backward()
    moved = {n.split(".lora_B")[0] for n, p in transformer.named_parameters() if p.grad is not None and p.grad.any()}
    for target in sd3.LORA_TARGETS:
        assert f"transformer_blocks.0.attn.{target}" in moved
    for target in ("to_q", "to_k", "to_v", "to_out.0"):
        assert f"transformer_blocks.0.attn2.{target}" in moved


def test_velocity_keeps_the_latents_dtype(sd35):
    latents, sigma, prompt = noise(sd35), torch.tensor([0.9, 0.2]), sd3.text_encoder(sd35)(PROMPTS)
    half = sd3.load_transformer(sd35, torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        v = sd3.velocity(half, latents, sigma, prompt)
        full = sd3.velocity(sd3.load_transformer(sd35), latents, sigma, prompt)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, full, rtol=0, atol=0.05)


def test_velocity_refuses_source_pictures(sd35):
    latents, prompt = noise(sd35), sd3.text_encoder(sd35)(PROMPTS)
    with pytest.raises(UserError, match="no source pictures"):
        sd3.velocity(sd3.load_transformer(sd35), latents, torch.ones(2), prompt, sources=(latents,))


@torch.no_grad()
def test_codec(sd35):
    encode, decode = sd3.picture_codec(sd35)
    pictures = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode(pictures)
    vae = pipeline(sd35).vae
    theirs = (vae.encode(pictures).latent_dist.mode() - 0.0609) * 1.5305
    assert_close(latents, theirs)
    assert latents.shape[1:] == sd3.latent_shape(sd35, HEIGHT, WIDTH)
    assert decode(latents).shape == pictures.shape
    assert decode(100 * latents).abs().max() <= 1


@pytest.mark.parametrize(("height", "width"), [(40, 48), (32, 24), (0, 32), (32, 144)])
def test_bad_size(sd35, height, width):
    with pytest.raises(UserError, match="multiples of 16, at most 128"):
        sd3.latent_shape(sd35, height, width)


def test_transformer_folder_itself(sd35):
    whole, alone = sd3.load_transformer(sd35), sd3.load_transformer(sd35 / "transformer")
    assert not whole.training
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), alone.parameters(), strict=True))


def test_sharded_transformer(sd35, tmp_path):
    whole = sd3.load_transformer(sd35)
    whole.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    again = sd3.load_transformer(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("load", "gone"),
    [
        (sd3.load_transformer, "transformer"),
        (sd3.load_transformer, "transformer/config.json"),
        (sd3.load_transformer, "transformer/diffusion_pytorch_model.safetensors"),
        (sd3.text_encoder, "text_encoder_2"),
        (sd3.text_encoder, "text_encoder_2/model.safetensors"),
        (sd3.text_encoder, "text_encoder_3"),
        (sd3.text_encoder, "tokenizer"),
        (sd3.text_encoder, "tokenizer_3/tokenizer.json"),
        (sd3.picture_codec, "vae"),
        (lambda folder: sd3.latent_shape(folder, 32, 32), "vae/config.json"),
        (lambda folder: sd3.sigmas(folder, 4, 32, 32), "scheduler"),
    ],
)
def test_what_is_missing_is_named(sd35, tmp_path, load, gone):
    folder = shutil.copytree(sd35, tmp_path / "copy")
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    with pytest.raises(UserError, match=str(folder)) as error:
        load(folder)
    assert gone.split("/")[0] in str(error.value)


def test_missing_weights_are_refused(sd35, tmp_path):
    folder = shutil.copytree(sd35, tmp_path / "copy")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights["text_projection.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder: the weights lack 1 tensor, such as text_projection.weight"):
        sd3.text_encoder(folder)
    file.write_bytes(b"cut")
    with pytest.raises(UserError, match=r"text_encoder/model\.safetensors: is text and no safetensors file"):
        sd3.text_encoder(folder)
