"""FLUX.1 and Kontext: the same latents and pictures as diffusers' pipelines, whatever is batched together."""

import shutil
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from tiny_flux import save_tiny

from danceopd.models.backbones import flux
from danceopd.support.errors import UserError

PROMPTS, NEGATIVE = ["a red ball on a table", "Blue cube, left of it: 2 dogs!"], ["blurry", ""]
HEIGHT, WIDTH, STEPS, GUIDANCE = 48, 80, 4, 3.5


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux")
    return {
        "dev": save_tiny(root / "dev", seed=0, pipeline="FluxPipeline"),
        "schnell": save_tiny(root / "schnell", seed=1, pipeline="FluxPipeline", guidance_embeds=False),
        "kontext": save_tiny(root / "kontext", seed=2),
    }


@pytest.fixture(scope="session")
def loaded(folders) -> dict[str, dict]:
    """Of each folder the pipeline, the transformer, the codec and the encoded prompts."""
    everything = {}
    for name, folder in folders.items():
        encode_text = flux.text_encoder(folder)
        everything[name] = {
            "folder": folder,
            "pipe": diffusers.DiffusionPipeline.from_pretrained(folder),
            "transformer": flux.load_transformer(folder).requires_grad_(False),
            "codec": flux.picture_codec(folder),
            "prompt": encode_text(PROMPTS),
            "negative": encode_text(NEGATIVE),
        }
        everything[name]["pipe"].set_progress_bar_config(disable=True)
    return everything


def noise(folder, count: int = 2, seed: int = 3) -> torch.Tensor:
    shape = flux.latent_shape(folder, HEIGHT, WIDTH)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def pictures(height: int, width: int, seed: int = 4) -> torch.Tensor:
    """Two pictures in [-1, 1]."""
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pack(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


def sample(of: dict, sources=(), scale: float = 1.0) -> torch.Tensor:
    """Euler over the module's own sigmas, guided by `scale` if it is not 1."""
    latents, levels = noise(of["folder"]), flux.sigmas(of["folder"], STEPS, HEIGHT, WIDTH)
    for sigma, following in pairwise(levels):
        at = (of["transformer"], latents, sigma.expand(len(latents)))
        velocity = flux.velocity(*at, of["prompt"], sources, GUIDANCE)
        if scale != 1:
            uncond = flux.velocity(*at, of["negative"], sources, GUIDANCE)
            velocity = uncond + scale * (velocity - uncond)
        latents = latents + (following - sigma) * velocity
    return latents


def ask_pipeline(of: dict, output_type: str, scale: float = 1.0, **options) -> torch.Tensor:
    if scale != 1:
        options |= {"negative_prompt": NEGATIVE, "true_cfg_scale": scale}
    if type(of["pipe"]).__name__ == "FluxKontextPipeline":
        options |= {"max_area": HEIGHT * WIDTH, "_auto_resize": False}
    return of["pipe"](
        prompt=PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=pack(noise(of["folder"])),
        output_type=output_type,
        **options,
    ).images


def assert_close(ours: torch.Tensor, theirs: torch.Tensor):
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["dev", "schnell", "kontext"])
def test_t2i_is_the_pipelines(loaded, name, scale):
    of = loaded[name]
    ours = sample(of, scale=scale)
    assert_close(pack(ours), ask_pipeline(of, "latent", scale))
    assert_close(of["codec"][1](ours) / 2 + 0.5, ask_pipeline(of, "pt", scale))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_edit_is_the_pipelines(loaded, scale):
    of = loaded["kontext"]
    source = pictures(64, 32)
    ours = sample(of, (of["codec"][0](source),), scale)
    image = {"image": source / 2 + 0.5}
    assert_close(pack(ours), ask_pipeline(of, "latent", scale, **image))
    assert_close(of["codec"][1](ours) / 2 + 0.5, ask_pipeline(of, "pt", scale, **image))
    assert (ours - sample(of, scale=scale)).abs().max() > 0.01  # the source counts


@pytest.mark.parametrize("count", [2, 3])
def test_several_sources_are_tiles_of_one(loaded, count):
    """Two upright ones stand side by side, a third lies below them: to the pipeline, one stitched source."""
    of = loaded["kontext"]
    first, second, third = (
        of["codec"][0](pictures(*size, seed)) for size, seed in (((64, 32), 4), ((64, 32), 5), ((32, 64), 6))
    )
    stitched = torch.cat([first, second], dim=3)
    if count == 3:
        stitched = torch.cat([stitched, third], dim=2)
    ours = sample(of, (first, second, third)[:count])
    assert_close(pack(ours), ask_pipeline(of, "latent", image=stitched))


def test_tiles_of_different_sizes_do_not_overlap():
    latents = torch.zeros(1, 4, 4, 6)
    sizes = [(4, 8), (6, 6), (8, 2), (2, 2)]
    ids = flux._positions(latents, tuple(torch.zeros(1, 4, *size) for size in sizes))
    assert len(ids.unique(dim=0)) == len(ids) == 6 + sum(h * w // 4 for h, w in sizes)
    assert ids[:, 0].tolist() == [0] * 6 + [1] * (len(ids) - 6)


@pytest.mark.parametrize("name", ["dev", "kontext"])
def test_text_is_the_pipelines(loaded, name):
    of, prompts = loaded[name], [PROMPTS[0], "longer than both encoders read " * 30]
    with torch.no_grad():
        embeds, pooled, text_ids = of["pipe"].encode_prompt(prompts)
    assert not text_ids.any()
    ours = flux.text_encoder(of["folder"])(prompts)
    assert torch.equal(ours["prompt_embeds"], embeds)
    assert torch.equal(ours["pooled_prompt_embeds"], pooled)
    assert (embeds[0] - embeds[1]).abs().max() > 0.1


def test_sigmas_are_the_schedulers_and_depend_on_the_size(loaded):
    of = loaded["dev"]
    ask_pipeline(of, "latent")
    levels = flux.sigmas(of["folder"], STEPS, HEIGHT, WIDTH)
    assert torch.equal(levels, of["pipe"].scheduler.sigmas)
    assert levels.dtype == torch.float32
    assert levels[0] == 1
    assert levels[-1] == 0
    assert len(levels) == STEPS + 1
    assert (flux.sigmas(of["folder"], STEPS, 1024, 1024) - levels)[1:-1].min() > 0.01


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_batch_is_each_sample_alone(loaded, count):
    """Prompt, sigma, embedded guidance and sources are each sample's own."""
    of = loaded["kontext"]
    sources = tuple(of["codec"][0](pictures(*size)) for size in ((64, 32), (32, 48)))[:count]
    latents, sigma, guidance = noise(of["folder"]), torch.tensor([0.9, 0.3]), torch.tensor([3.5, 2.0])
    together = flux.velocity(of["transformer"], latents, sigma, of["prompt"], sources, guidance)
    for i in range(2):
        row = slice(i, i + 1)
        prompt = {key: value[row] for key, value in of["prompt"].items()}
        own = tuple(source[row] for source in sources)
        alone = flux.velocity(of["transformer"], latents[row], sigma[row], prompt, own, guidance[i].item())
        assert_close(together[row], alone)
        other = flux.velocity(of["transformer"], latents[row], sigma[1 - i : 2 - i], prompt, own, guidance[i].item())
        assert (alone - other).abs().max() > 1e-3


def test_embedded_guidance_counts_where_there_is_one(loaded):
    arguments = {}
    for name in ("dev", "schnell"):
        of = loaded[name]
        arguments[name] = of["transformer"], noise(of["folder"]), torch.full((2,), 0.5), of["prompt"]
    changed = flux.velocity(*arguments["dev"], guidance=2.0) - flux.velocity(*arguments["dev"], guidance=3.5)
    assert changed.abs().max() > 1e-3
    assert torch.equal(flux.velocity(*arguments["schnell"], guidance=2.0), flux.velocity(*arguments["schnell"]))
    with pytest.raises(UserError, match="guidance"):
        flux.velocity(*arguments["dev"])


def test_latents_keep_their_dtype(loaded, folders):
    of, transformer = loaded["kontext"], flux.load_transformer(folders["kontext"], torch.bfloat16)
    arguments = noise(folders["kontext"]), torch.full((2,), 0.5), of["prompt"], (), GUIDANCE
    low, full = flux.velocity(transformer, *arguments), flux.velocity(of["transformer"], *arguments)
    assert transformer.dtype == torch.bfloat16
    assert low.dtype == torch.float32
    assert (low - full).abs().mean() < 0.05 * full.abs().mean()


def test_gradient_reaches_the_lora_of_every_attention(folders, loaded):
    peft = pytest.importorskip("peft")
    transformer = flux.load_transformer(folders["kontext"])
    model = peft.get_peft_model(transformer, peft.LoraConfig(r=2, target_modules=list(flux.LORA_TARGETS)))
    prompt, source = loaded["kontext"]["prompt"], noise(folders["kontext"], seed=5)
    flux.velocity(model, noise(folders["kontext"]), torch.full((2,), 0.5), prompt, (source,), GUIDANCE).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    assert len(trained) == 2 * 8 + 2 * 3  # of the double blocks and the single ones
    # The last double block's text stream still feeds the single blocks: nothing is cut off.
    assert all(gradient.abs().max() > 0 for gradient in trained.values())


def test_codec_round_trip(loaded, folders):
    encode, decode = loaded["dev"]["codec"]
    latents = encode(pictures(HEIGHT, WIDTH))
    assert latents.shape == (2, *flux.latent_shape(folders["dev"], HEIGHT, WIDTH)) == (2, 4, 6, 10)
    decoded = decode(latents)
    assert decoded.shape == (2, 3, HEIGHT, WIDTH)
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize("size", [(40, 64), (64, 56), (0, 64)])
def test_a_bad_size_names_the_multiple(folders, loaded, size):
    with pytest.raises(UserError, match="multiples of 16"):
        flux.latent_shape(folders["dev"], *size)
    with pytest.raises(UserError, match="multiples of 16"):
        flux.sigmas(folders["dev"], STEPS, *size)
    with pytest.raises(UserError, match="multiples of 16"):
        loaded["dev"]["codec"][0](torch.zeros(1, 3, *size))


def test_tasks(folders):
    assert flux.tasks(folders["dev"]) == flux.tasks(folders["schnell"]) == ("t2i",)
    assert flux.tasks(folders["kontext"]) == ("t2i", "edit")
    with pytest.raises(UserError, match=str(folders["dev"] / "transformer")):
        flux.tasks(folders["dev"] / "transformer")


def test_transformers_load_from_shards_and_by_themselves(folders, loaded, tmp_path):
    loaded["dev"]["transformer"].save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole = loaded["dev"]["transformer"].state_dict()
    for folder in (tmp_path / "sharded", folders["dev"] / "transformer"):
        transformer = flux.load_transformer(folder)
        assert not transformer.training
        assert all(torch.equal(value, whole[name]) for name, value in transformer.state_dict().items())


def test_what_is_missing_is_named(folders, loaded, tmp_path):
    for load in (flux.load_transformer, flux.text_encoder, flux.picture_codec, flux.tasks):
        with pytest.raises(UserError, match=str(tmp_path)):
            load(tmp_path)
        with pytest.raises(UserError, match=r"no folder .*nowhere"):
            load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="AutoencoderKL"):
        flux.load_transformer(folders["dev"] / "vae")
    torn = shutil.copytree(folders["dev"], tmp_path / "torn")
    for load, part in ((flux.load_transformer, "transformer"), (flux.text_encoder, "text_encoder")):
        for weights in (torn / part).glob("*.safetensors"):
            weights.write_bytes(weights.read_bytes()[:2000])
        with pytest.raises(UserError, match=str(torn / part)):
            load(torn)
    loaded["dev"]["transformer"].save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if name != "proj_out.bias"}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cut: the weights lack 1 tensor, such as proj_out\.bias"):
        flux.load_transformer(tmp_path / "cut")
