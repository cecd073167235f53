"""Z-Image: the same latents and pictures as diffusers' pipelines, on tiny models of the real classes."""

import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from peft import LoraConfig
from tiny_z_image import save_tiny, save_tiny_omni

from danceopd.models.backbones import z_image
from danceopd.support.errors import UserError

HEIGHT, WIDTH, STEPS = 64, 96, 4
# 28 and 66 tokens: one and three blocks of the transformer's 32.
PROMPTS = ["a red cat", "a blue dog on a long table, seen from far above"]
NEGATIVES = ["blurred", ""]


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="session")
def omni(tmp_path_factory):
    """The omni pipeline, with the scheduler's resolution-dependent shift."""
    folder = save_tiny_omni(tmp_path_factory.mktemp("z_image_omni"))
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(params=["plain", "omni"])
def folder(request):
    return request.getfixturevalue(request.param)


def pipeline_of(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(count=2, seed=1):
    return torch.randn(count, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(seed))


def picture(height, width, seed):
    """[3, H, W] in [-1, 1], of 8 bits as the pipeline takes it: blobs and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    values = smooth * 220 + 20 * torch.rand(3, height, width, generator=generator)
    return values.round().clamp(0, 255) / 127.5 - 1


def sample(folder, latents, prompt, negative=None, alpha=1.0, sources=()):
    """The Euler loop; alpha as in danceopd.core.fields.guided."""
    transformer, levels = z_image.load_transformer(folder), z_image.sigmas(folder, STEPS, HEIGHT, WIDTH)
    with torch.no_grad():
        for sigma, following in pairwise(levels):
            per_sample = sigma.expand(len(latents))
            v = z_image.velocity(transformer, latents, per_sample, prompt, sources)
            if negative is not None:
                empty = z_image.velocity(transformer, latents, per_sample, negative, sources)
                v = empty + alpha * (v - empty)
            latents = latents + (following - sigma) * v
    return latents


def assert_same(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    difference, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    print(f"largest difference {difference:.2e} of {size:.2f}")
    assert difference <= 1e-5 * size


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_text_to_image_equals_the_pipeline(folder, guidance):
    pipeline, latents = pipeline_of(folder), noise()
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "guidance_scale": guidance}

    def theirs(output_type):
        prompts, negatives = list(PROMPTS), list(NEGATIVES)  # the pipeline writes into its lists
        call = pipeline(
            prompt=prompts, negative_prompt=negatives, latents=latents, output_type=output_type, **arguments
        )
        return call.images

    encode = z_image.text_encoder(folder)
    prompt, negative = encode(PROMPTS), encode(NEGATIVES) if guidance else None
    ours = sample(folder, latents, prompt, negative, 1 + guidance)
    assert_same(ours, theirs("latent"))
    assert torch.equal(z_image.sigmas(folder, STEPS, HEIGHT, WIDTH), pipeline.scheduler.sigmas)
    _, decode = z_image.picture_codec(folder)
    assert_same(decode(ours) / 2 + 0.5, theirs("pt"))


@pytest.mark.parametrize("guidance", [0.0, 3.0])
@pytest.mark.parametrize("sizes", [[(64, 96)], [(80, 64), (64, 112)]], ids=["one reference", "two references"])
def test_edit_equals_the_pipeline(omni, sizes, guidance):
    pictures = [picture(height, width, seed) for seed, (height, width) in enumerate(sizes)]
    pipeline, latents = pipeline_of(omni), noise()
    pipeline.vae.to(torch.bfloat16)  # the pipeline encodes references in bfloat16
    images = [VaeImageProcessor().postprocess(p[None], output_type="pil")[0] for p in pictures]
    theirs = pipeline(
        image=images,
        prompt=list(PROMPTS),
        negative_prompt=list(NEGATIVES),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=latents,
        output_type="latent",
    ).images
    encode_text, (encode, _) = z_image.text_encoder(omni), z_image.picture_codec(omni, dtype=torch.bfloat16)
    prompt = encode_text(PROMPTS, [pictures] * 2)
    negative = encode_text(NEGATIVES, [pictures] * 2) if guidance else None
    # The pipeline's own tensors: equal values in another memory layout, which bfloat16 convolutions round otherwise.
    seen = [pipeline.image_processor.preprocess(i, i.height, i.width, resize_mode="crop") for i in images]
    assert all(torch.equal(tensor[0], p) for tensor, p in zip(seen, pictures, strict=True))
    sources = tuple(encode(tensor).float().expand(2, -1, -1, -1) for tensor in seen)
    ours = sample(omni, latents, prompt, negative, 1 + guidance, sources)
    assert_same(ours, theirs)
    # The references matter, and so does what the vision encoder saw of them.
    without = sample(omni, latents, encode_text(PROMPTS))
    blind = prompt | {"siglip_embeds": torch.zeros_like(prompt["siglip_embeds"])}
    edited, unseen = (sample(omni, latents, rows, sources=sources) for rows in (prompt, blind))
    assert (edited - without).abs().max() > 0.01
    assert (edited - unseen).abs().max() > 0.01


def test_a_mixed_batch_equals_each_sample_alone(folder):
    """Two prompts of different lengths at two noise levels."""
    transformer, latents, sigma = z_image.load_transformer(folder), noise(), torch.tensor([0.9, 0.3])
    encode, sources, pictures = z_image.text_encoder(folder), (), None
    if "edit" in z_image.tasks(folder):
        sources = (noise(seed=2), noise(seed=3)[:, :, :6])
        pictures = [[picture(64, 96, 1), picture(64, 64, 2)], [picture(96, 64, 3), picture(64, 80, 4)]]
    prompt = encode(PROMPTS, pictures)
    with torch.no_grad():
        both = z_image.velocity(transformer, latents, sigma, prompt, sources)
        for i in range(2):
            row = slice(i, i + 1)
            own = encode(PROMPTS[row], pictures and pictures[row])
            alone = z_image.velocity(transformer, latents[row], sigma[row], own, tuple(s[row] for s in sources))
            assert_same(both[row], alone)
            cut = {key: value[row] for key, value in prompt.items()}  # with the longer prompt's padding
            assert torch.equal(
                z_image.velocity(transformer, latents[row], sigma[row], cut, tuple(s[row] for s in sources)), alone
            )


def test_prompt_rows(plain, omni):
    rows = z_image.text_encoder(plain)(PROMPTS, [[picture(64, 64, 0)], []])  # which this pipeline does not look at
    assert set(rows) == {"prompt_embeds", "prompt_mask"}
    assert rows["prompt_mask"].sum(1).tolist() == [28, 66]
    assert rows["prompt_embeds"].shape == (2, 66, 32)
    assert not rows["prompt_embeds"][~rows["prompt_mask"]].any()
    rows = z_image.text_encoder(omni)(PROMPTS, [[picture(64, 64, 0)], [picture(64, 64, 0), picture(96, 64, 1)]])
    assert all(len(value) == 2 for value in rows.values())
    assert torch.equal(rows["prompt_parts"].sum(1), rows["prompt_mask"].sum(1))
    assert (rows["prompt_parts"] > 0).sum(1).tolist() == [3, 4]
    assert (rows["siglip_shapes"].prod(-1) > 0).sum(1).tolist() == [1, 2]


def test_velocity_keeps_the_latents_dtype_and_trains_lora(folder):
    transformer = z_image.load_transformer(folder, torch.bfloat16).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=2, target_modules=list(z_image.LORA_TARGETS)))
    sources, pictures = ((noise(),), [[picture(64, 64, 0)]] * 2) if "edit" in z_image.tasks(folder) else ((), None)
    prompt = z_image.text_encoder(folder)(PROMPTS, pictures)
    v = z_image.velocity(transformer, noise(), torch.tensor([0.9, 0.3]), prompt, sources, guidance=2.0)
    assert v.dtype == torch.float32
    assert v.shape == noise().shape
    v.square().sum().backward()
    trained = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    blocks = 4 + (1 if sources else 0)  # two layers, the refiners of picture, prompt and reference
    assert len(trained) == 2 * 4 * blocks
    assert all(gradient.abs().sum() > 0 for name, gradient in trained.items() if "lora_B" in name)


def test_wrong_pictures_are_refused(plain, omni):
    transformer, sigma = z_image.load_transformer(omni), torch.full((2,), 0.5)
    encode = z_image.text_encoder(omni)
    for rows, sources in [
        (encode(PROMPTS), (noise(),)),
        (encode(PROMPTS, [[picture(64, 64, 0)]] * 2), ()),
        (encode(PROMPTS, [[picture(64, 64, 0)], []]), (noise(),)),
    ]:
        with pytest.raises(ValueError, match="must be encoded with their"):
            z_image.velocity(transformer, noise(), sigma, rows, sources)
    with pytest.raises(ValueError, match="only the omni pipeline"):
        z_image.velocity(transformer, noise(), sigma, z_image.text_encoder(plain)(PROMPTS), (noise(),))


def test_codec_and_shapes(plain):
    encode, decode = z_image.picture_codec(plain)
    pictures = torch.stack([picture(HEIGHT, WIDTH, 0), picture(HEIGHT, WIDTH, 1)])
    latents = encode(pictures)
    assert latents.shape == (2, *z_image.latent_shape(plain, HEIGHT, WIDTH)) == (2, 4, 8, 12)
    decoded = decode(latents)
    assert decoded.shape == pictures.shape
    assert decoded.abs().max() <= 1
    for height, width in [(64, 72), (0, 64)]:
        with pytest.raises(UserError, match="multiples of 16"):
            z_image.latent_shape(plain, height, width)


def test_loading(plain, omni, tmp_path):
    assert z_image.tasks(plain) == ("t2i",)
    assert z_image.tasks(omni) == ("t2i", "edit")
    own = z_image.load_transformer(plain / "transformer").state_dict()
    assert all(torch.equal(own[key], value) for key, value in z_image.load_transformer(plain).state_dict().items())
    sharded = shutil.copytree(plain, tmp_path / "sharded")
    shutil.rmtree(sharded / "transformer")
    z_image.load_transformer(plain).save_pretrained(sharded / "transformer", max_shard_size="100KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    assert all(torch.equal(own[key], value) for key, value in z_image.load_transformer(sharded).state_dict().items())


@pytest.mark.parametrize(
    ("missing", "load"),
    [
        ("transformer", z_image.load_transformer),
        ("transformer/diffusion_pytorch_model.safetensors", z_image.load_transformer),
        ("text_encoder", z_image.text_encoder),
        ("tokenizer", z_image.text_encoder),
        ("tokenizer/chat_template.jinja", z_image.text_encoder),
        ("model_index.json", z_image.text_encoder),
        ("model_index.json", z_image.tasks),
        ("vae", z_image.picture_codec),
        ("vae/config.json", lambda folder: z_image.latent_shape(folder, 64, 64)),
        ("scheduler", lambda folder: z_image.sigmas(folder, 4, 64, 64)),
    ],
)
def test_what_is_missing_is_named(plain, tmp_path, missing, load):
    folder = shutil.copytree(plain, tmp_path / "broken")
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=str(folder)):
        load(folder)


def test_another_pipeline_is_refused(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "other")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="holds a FluxPipeline"):
        z_image.text_encoder(folder)
