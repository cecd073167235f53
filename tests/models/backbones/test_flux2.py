"""FLUX.2 beside diffusers' own pipelines: klein with true guidance, dev with an embedded one, and references."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2Pipeline
from peft import LoraConfig
from PIL import Image
from tiny_flux2 import save_tiny

from danceopd.models.backbones import flux2
from danceopd.models.shared_base import target_layers
from danceopd.support.errors import UserError

HEIGHT, WIDTH, STEPS = 64, 96, 3
PROMPTS = ["a red cat", "two blue dogs left of a tree"]


class Tiny:
    """One folder with everything of it loaded, and the diffusers pipeline of it."""

    def __init__(self, folder):
        self.folder = folder
        self.transformer = flux2.load_transformer(folder)
        self.prompt = flux2.text_encoder(folder)
        self.encode, self.decode = flux2.picture_codec(folder)
        self.pipeline = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def noise(self, n=2):
        shape = flux2.latent_shape(self.folder, HEIGHT, WIDTH)
        return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def klein(tmp_path_factory):
    return Tiny(save_tiny(tmp_path_factory.mktemp("klein")))


@pytest.fixture(scope="session")
def dev(tmp_path_factory):
    return Tiny(save_tiny(tmp_path_factory.mktemp("dev"), dev=True))


@pytest.fixture(params=["klein", "dev"])
def tiny(request):
    return request.getfixturevalue(request.param)


def references(*sizes):
    """Random pictures of (height, width): as PIL pictures, and as tensors [1, 3, H, W] in [-1, 1]."""
    pixels = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]
    tensors = [torch.from_numpy(p).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in pixels]
    return [Image.fromarray(p) for p in pixels], tensors


@torch.no_grad()
def euler(tiny, field):
    """The latents after each step from tiny.noise(), along field(latents, sigma)."""
    latents, sigmas, path = tiny.noise(), flux2.sigmas(tiny.folder, STEPS, HEIGHT, WIDTH), []
    assert sigmas.shape == (STEPS + 1,)
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    for sigma, following in pairwise(sigmas):
        latents = latents + (following - sigma) * field(latents, sigma.expand(len(latents)))
        path.append(latents)
    return path


def run(tiny, **options):
    """The diffusers pipeline's latents [B, C, h, w] after each step, and its pictures in [-1, 1]."""
    path = []

    def keep(pipeline, step, timestep, values):
        path.append(values["latents"].transpose(1, 2).unflatten(2, (HEIGHT // 16, WIDTH // 16)))
        return {}

    options = {"prompt": PROMPTS, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, **options}
    pictures = tiny.pipeline(latents=tiny.noise(), output_type="pt", callback_on_step_end=keep, **options).images
    return path, 2 * pictures - 1


def assert_equal(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def assert_same_run(tiny, path, expected):
    for ours, theirs in zip(path, expected[0], strict=True):
        assert_equal(ours, theirs)
    assert_equal(tiny.decode(path[-1]), expected[1])


def guided(tiny, scale, sources=()):
    """True classifier-free guidance with the empty prompt."""
    cond, uncond = tiny.prompt(PROMPTS), tiny.prompt([""] * len(PROMPTS))

    def field(latents, sigma):
        v = flux2.velocity(tiny.transformer, latents, sigma, cond, sources)
        u = flux2.velocity(tiny.transformer, latents, sigma, uncond, sources)
        return u + scale * (v - u)

    return field


def test_a_shorter_text_is_the_pipelines(klein):
    ours = flux2.text_encoder(klein.folder, max_sequence_length=40)(PROMPTS)["prompt_embeds"]
    theirs, _ = klein.pipeline.encode_prompt(PROMPTS, max_sequence_length=40)
    assert ours.shape[1] == 40
    assert_equal(ours, theirs)


@pytest.mark.parametrize("sizes", [(), ((64, 96),), ((96, 64), (64, 80))])
def test_klein_with_true_guidance_runs_as_the_pipeline(klein, sizes):
    pil, tensors = references(*sizes)
    sources = tuple(klein.encode(x).expand(2, -1, -1, -1) for x in tensors)
    path = euler(klein, guided(klein, 4.0, sources))
    assert_same_run(klein, path, run(klein, guidance_scale=4.0, image=pil or None))


@pytest.mark.parametrize("sizes", [(), ((64, 96),), ((96, 64), (64, 80))])
def test_dev_with_embedded_guidance_runs_as_the_pipeline(dev, sizes):
    pil, tensors = references(*sizes)
    sources = tuple(dev.encode(x).expand(2, -1, -1, -1) for x in tensors)
    prompt = dev.prompt(PROMPTS)
    path = euler(dev, lambda z, s: flux2.velocity(dev.transformer, z, s, prompt, sources, guidance=2.5))
    assert_same_run(dev, path, run(dev, guidance_scale=2.5, image=pil or None))


def test_bfloat16_rounds_as_the_pipeline(klein):
    pipeline = DiffusionPipeline.from_pretrained(klein.folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    transformer = flux2.load_transformer(klein.folder, torch.bfloat16)
    prompt = flux2.text_encoder(klein.folder, dtype=torch.bfloat16)(PROMPTS)
    assert prompt["prompt_embeds"].dtype == torch.bfloat16
    seen = []

    def keep(module, inputs, output):
        seen.append(output[0])

    hook = pipeline.transformer.register_forward_hook(keep)
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "sigmas": [0.3], "guidance_scale": 1.0}
    pipeline(prompt=PROMPTS, latents=klein.noise(), output_type="latent", **options)
    hook.remove()
    sigma = pipeline.scheduler.sigmas[0].expand(2)
    with torch.no_grad():
        ours = flux2.velocity(transformer, klein.noise(), sigma, prompt)
    assert ours.dtype == torch.float32  # the latents' own
    assert torch.equal(ours, seen[0].float().transpose(1, 2).unflatten(2, ours.shape[2:]))


def test_the_prompt_and_the_pictures_are_encoded_as_in_the_pipeline(tiny):
    ours = tiny.prompt(PROMPTS)
    theirs = tiny.pipeline.encode_prompt(PROMPTS)[0]
    assert ours.keys() == {"prompt_embeds"}
    assert not ours["prompt_embeds"].requires_grad
    assert_equal(ours["prompt_embeds"], theirs)
    assert (ours["prompt_embeds"][0] - ours["prompt_embeds"][1]).abs().max() > 0.1
    picture = references((64, 80))[1][0]
    latents = tiny.encode(picture)
    assert_equal(latents, tiny.pipeline._encode_vae_image(picture, None))
    assert latents.shape == (1, *flux2.latent_shape(tiny.folder, 64, 80))
    decoded = tiny.decode(latents)
    assert decoded.shape == picture.shape
    assert decoded.abs().max() <= 1


@torch.no_grad()
def test_a_mixed_batch_equals_each_sample_alone(tiny):
    z, sigma, prompt = tiny.noise(), torch.tensor([0.9, 0.25]), tiny.prompt(PROMPTS)
    sources = tuple(torch.randn(2, 16, *size) for size in ((4, 6), (5, 4)))
    guidance = torch.tensor([1.0, 4.0])
    both = flux2.velocity(tiny.transformer, z, sigma, prompt, sources, guidance)
    for i in range(2):
        row = {name: value[i : i + 1] for name, value in prompt.items()}
        pictures = tuple(x[i : i + 1] for x in sources)
        alone = flux2.velocity(tiny.transformer, z[i : i + 1], sigma[i : i + 1], row, pictures, guidance[i].item())
        assert_equal(both[i : i + 1], alone)


@torch.no_grad()
def test_every_input_counts(tiny):
    z, sigma, prompt = tiny.noise(), torch.tensor([0.9, 0.9]), tiny.prompt(PROMPTS)
    sources = tuple(torch.randn(2, 16, 4, 6) for _ in range(2))

    def ask(sigma=sigma, prompt=prompt, sources=sources, guidance=4.0):
        return flux2.velocity(tiny.transformer, z, sigma, prompt, sources, guidance)

    changes = [{"sigma": sigma / 2}, {"prompt": tiny.prompt(PROMPTS[::-1])}, {"sources": ()}]
    changes.append({"sources": sources[::-1]})  # the order is the references' time
    for change in changes:
        assert (ask(**change) - ask()).abs().max() > 1e-3, change.keys()
    counts = tiny.transformer.config.guidance_embeds
    assert counts == ((ask(guidance=1.0) - ask()).abs().max() > 1e-3)


def test_lora_trains_every_attention_projection_and_nothing_else(tiny):
    transformer = flux2.load_transformer(tiny.folder)
    prompt, sigma = tiny.prompt(PROMPTS), torch.tensor([0.9, 0.3])
    flux2._position_ids.cache_clear()
    with torch.inference_mode():  # the position ids that are cached here must serve training too
        before = flux2.velocity(transformer, tiny.noise(), sigma, prompt, guidance=4.0)
    linear = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    transformer.add_adapter(LoraConfig(r=2, target_modules=target_layers(transformer, flux2.LORA_TARGETS)))
    adapted = {name.removesuffix(".lora_A") for name, _ in transformer.named_modules() if name.endswith(".lora_A")}
    assert adapted == {name for name in linear if ".attn." in name}
    v = flux2.velocity(transformer, tiny.noise(), sigma, prompt, guidance=4.0)
    assert_equal(v.detach(), before.clone())
    v.square().sum().backward()
    # B starts at zero: A gets no gradient yet. The last block's prompt tokens reach no picture, so none is left out.
    assert all(p.grad.abs().max() > 0 for name, p in transformer.named_parameters() if "lora_B" in name)


def test_sharded_weights_and_a_bare_transformer_folder_load(klein, tmp_path):
    klein.transformer.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = flux2.load_transformer(tmp_path)
    assert not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in klein.transformer.state_dict().items())


def test_bad_sizes_are_refused(klein):
    for height, width in ((64, 72), (40, 64), (0, 64)):
        with pytest.raises(UserError, match=rf"multiples of 16, got {height} x {width}"):
            flux2.latent_shape(klein.folder, height, width)
    with pytest.raises(UserError, match="multiples of 16, got 64 x 72"):
        klein.encode(torch.zeros(1, 3, 64, 72))
    with pytest.raises(UserError, match="at least 1, got 0"):
        flux2.sigmas(klein.folder, 0, HEIGHT, WIDTH)


def test_what_is_missing_is_named(dev, tmp_path):
    for call in (flux2.load_transformer, flux2.text_encoder, flux2.picture_codec):
        with pytest.raises(UserError, match=str(tmp_path)):
            call(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path / "vae")):
        flux2.latent_shape(tmp_path, HEIGHT, WIDTH)
    (tmp_path / "config.json").write_text((dev.folder / "transformer" / "config.json").read_text())
    with pytest.raises(UserError, match=str(tmp_path)):  # no weights
        flux2.load_transformer(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="holds a FluxPipeline, not one of Flux2KleinPipeline, Flux2Pipeline"):
        flux2.text_encoder(tmp_path)
    with pytest.raises(UserError, match="give guidance"):
        flux2.velocity(dev.transformer, dev.noise(), torch.ones(2), dev.prompt(PROMPTS))


def test_missing_weights_are_refused(klein, tmp_path):
    config = {**json.loads((klein.folder / "transformer" / "config.json").read_text()), "num_layers": 3}
    klein.transformer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the weights lack 16 tensors, such as transformer_blocks\.2"):
        flux2.load_transformer(tmp_path)


def test_the_pipelines_pack_latents_as_rows_of_the_picture(klein):
    z = klein.noise()
    packed = Flux2Pipeline._pack_latents(z)
    assert torch.equal(packed.transpose(1, 2).unflatten(2, z.shape[2:]), z)
