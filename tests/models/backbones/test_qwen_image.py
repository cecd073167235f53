"""Qwen-Image and Qwen-Image-Edit-Plus: an Euler loop over our functions draws what the diffusers pipelines draw."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from peft import LoraConfig
from PIL import Image
from tiny_qwen_image import save_tiny

from danceopd.models.backbones import qwen_image
from danceopd.support.errors import UserError

HEIGHT, WIDTH, STEPS, SCALE = 64, 96, 3, 4.0
PROMPTS, NEGATIVE = ["a red cat", "two dogs, on a long sofa"], ["", "blurred"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen") / "text_to_image")


@pytest.fixture(scope="session")
def edit_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen") / "edit", edit=True)


@pytest.fixture(scope="session")
def transformer(folder):
    return qwen_image.load_transformer(folder)


@pytest.fixture(scope="session")
def edit_transformer(edit_folder):
    return qwen_image.load_transformer(edit_folder)


@pytest.fixture(scope="session")
def encode(folder):
    return qwen_image.text_encoder(folder)


@pytest.fixture(scope="session")
def encode_edit(edit_folder):
    return qwen_image.text_encoder(edit_folder)


@pytest.fixture
def reference_area(monkeypatch):
    """The pipeline scales references to about this many pixels: 1024 x 1024, which tiny models need not see."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", HEIGHT * WIDTH)


def noise(folder, batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *qwen_image.latent_shape(folder, HEIGHT, WIDTH), generator=generator)


def photo(height, width, seed):
    """A smooth picture, 8 bits a channel."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def pack(latents):
    return QwenImagePipeline._pack_latents(latents, *latents.shape)


@torch.no_grad()
def draw(folder, transformer, latents, prompt, negative=None, sources=()):
    """Euler from noise to data, with norm-preserving guidance if there is a negative prompt."""
    for high, low in pairwise(qwen_image.sigmas(folder, STEPS, HEIGHT, WIDTH)):
        sigma = high.expand(len(latents))
        step = qwen_image.velocity(transformer, latents, sigma, prompt, sources)
        if negative is not None:
            other = qwen_image.velocity(transformer, latents, sigma, negative, sources)
            step = qwen_image.combine(step, other, SCALE)
        latents = latents + (low - high) * step
    return latents


def call(pipeline, latents, **options):
    """(packed latents, picture in [-1, 1]) of the pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    kept = {}

    def keep(pipeline, step, timestep, tensors):
        kept.update(tensors)
        return {}

    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "true_cfg_scale": SCALE} | options
    pictures = pipeline(latents=pack(latents), output_type="pt", callback_on_step_end=keep, **options).images
    return kept["latents"], 2 * pictures - 1


def difference(ours, theirs):
    """The largest difference, relative to the size of the latents."""
    return ((ours - theirs).abs().max() / theirs.std()).item()


@pytest.mark.parametrize("guided", [False, True])
def test_text_to_image_equals_the_pipeline(folder, transformer, encode, guided):
    start = noise(folder, 2)
    pipeline = QwenImagePipeline.from_pretrained(folder)
    options = {"negative_prompt": NEGATIVE} if guided else {"true_cfg_scale": 1.0}
    latents, pictures = call(pipeline, start, prompt=PROMPTS, **options)
    ours = draw(folder, transformer, start, encode(PROMPTS), encode(NEGATIVE) if guided else None)
    assert difference(pack(ours), latents) < 1e-5
    assert (qwen_image.picture_codec(folder)[1](ours) - pictures).abs().max() < 1e-5


@pytest.mark.parametrize("sizes", [[(64, 96)], [(96, 64), (64, 64)]], ids=["one", "several"])
def test_editing_equals_the_pipeline(edit_folder, edit_transformer, encode_edit, reference_area, sizes):
    """Ours in one batch of two prompts of different lengths; the pipeline takes one prompt at a time."""
    start = noise(edit_folder, 2)
    photos = [[photo(*size, seed=10 * row + i) for i, size in enumerate(sizes)] for row in range(2)]
    pictures = [[tensor(image) for image in images] for images in photos]
    encode_picture, decode = qwen_image.picture_codec(edit_folder)
    sources = tuple(encode_picture(torch.stack(same_place)) for same_place in zip(*pictures, strict=True))
    assert [tuple(source.shape[2:]) for source in sources] == [(height // 8, width // 8) for height, width in sizes]
    prompt, negative = encode_edit(PROMPTS, pictures), encode_edit(NEGATIVE, pictures)
    assert not prompt["prompt_mask"].all()
    ours = draw(edit_folder, edit_transformer, start, prompt, negative, sources)

    pipeline = QwenImageEditPlusPipeline.from_pretrained(edit_folder)
    for row in range(2):
        latents, picture = call(
            pipeline, start[row : row + 1], image=photos[row], prompt=PROMPTS[row], negative_prompt=NEGATIVE[row]
        )
        assert difference(pack(ours[row : row + 1]), latents) < 1e-5
        assert (decode(ours[row : row + 1]) - picture).abs().max() < 1e-5

    # The references matter, and so does their order.
    without = draw(edit_folder, edit_transformer, start, prompt, negative)
    assert difference(without, ours) > 1e-3
    if len(sources) > 1:
        assert difference(draw(edit_folder, edit_transformer, start, prompt, negative, sources[::-1]), ours) > 1e-4


def test_an_editing_folder_draws_from_text_too(edit_folder, edit_transformer, encode_edit):
    start, prompt = noise(edit_folder, 2), encode_edit(PROMPTS)
    parts = QwenImageEditPlusPipeline.from_pretrained(edit_folder).components
    del parts["processor"]
    options = {"prompt_embeds": prompt["prompt_embeds"], "prompt_embeds_mask": prompt["prompt_mask"]}
    latents, _ = call(QwenImagePipeline(**parts), start, true_cfg_scale=1.0, **options)
    assert difference(pack(draw(edit_folder, edit_transformer, start, prompt)), latents) < 1e-5


def test_combine_keeps_the_norm_of_each_token(folder):
    cond, uncond = noise(folder, 2, seed=2), noise(folder, 2, seed=3)
    scale = torch.tensor([1.0, 4.0])
    mixed = qwen_image.combine(cond, uncond, scale)
    torch.testing.assert_close(mixed[0], cond[0])
    torch.testing.assert_close(pack(mixed).norm(dim=-1), pack(cond).norm(dim=-1))
    torch.testing.assert_close(mixed[1:], qwen_image.combine(cond[1:], uncond[1:], 4.0))
    plain = uncond[1:] + 4 * (cond[1:] - uncond[1:])
    torch.testing.assert_close(torch.cosine_similarity(pack(mixed[1:]), pack(plain), dim=-1), torch.ones(1, 24))


def test_a_sample_does_not_depend_on_its_batch(edit_folder, edit_transformer, encode_edit):
    """Prompts of different lengths, two noise levels and two references, in one batch and alone."""
    latents, sigma = noise(edit_folder, 2), torch.tensor([0.9, 0.2])
    sources = noise(edit_folder, 2, seed=2), noise(edit_folder, 2, seed=3)[..., :8]
    prompt = encode_edit(PROMPTS)
    with torch.no_grad():
        both = qwen_image.velocity(edit_transformer, latents, sigma, prompt, sources)
        for row in range(2):
            one = slice(row, row + 1)
            alone = encode_edit(PROMPTS[one])
            assert alone["prompt_mask"].all()
            references = tuple(source[one] for source in sources)
            expected = qwen_image.velocity(edit_transformer, latents[one], sigma[one], alone, references)
            assert difference(both[one], expected) < 1e-5
        swapped = qwen_image.velocity(edit_transformer, latents, sigma.flip(0), prompt, sources)
    assert difference(both, swapped) > 1e-2


def test_lora_on_the_default_targets_gets_gradients(folder, encode):
    model = qwen_image.load_transformer(folder, torch.bfloat16)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=list(qwen_image.LORA_TARGETS), init_lora_weights=False))
    latents = noise(folder, 2)
    velocity = qwen_image.velocity(model, latents, torch.tensor([0.9, 0.2]), encode(PROMPTS), guidance=3.5)
    assert velocity.shape == latents.shape
    assert velocity.dtype == torch.float32
    velocity.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 2 * len(model.transformer_blocks) * len(qwen_image.LORA_TARGETS)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_text_rows_are_padded_at_the_end_and_cut(encode):
    rows = encode(PROMPTS)
    assert rows["prompt_embeds"].shape[:2] == rows["prompt_mask"].shape
    lengths = rows["prompt_mask"].sum(1)
    assert lengths[1] - lengths[0] == len(PROMPTS[1]) - len(PROMPTS[0])
    assert not rows["prompt_embeds"][0, lengths[0] :].any()
    assert encode(["x" * 600])["prompt_embeds"].shape[1] == 512


def test_codec_shapes(folder):
    encode_picture, decode = qwen_image.picture_codec(folder)
    pictures = torch.stack([tensor(photo(HEIGHT, WIDTH, seed)) for seed in range(2)])
    latents = encode_picture(pictures)
    assert latents.shape[1:] == qwen_image.latent_shape(folder, HEIGHT, WIDTH) == (4, 8, 12)
    decoded = decode(latents)
    assert decoded.shape == pictures.shape
    assert decoded.abs().max() <= 1


def test_sigmas(folder):
    levels = qwen_image.sigmas(folder, STEPS, HEIGHT, WIDTH)
    assert levels.shape == (STEPS + 1,)
    assert levels.dtype == torch.float32
    assert levels[0] == 1
    assert levels[-1] == 0
    assert (qwen_image.sigmas(folder, STEPS, 512, 512)[1] > levels[1]).item()  # a larger picture starts noisier


def test_tasks(folder, edit_folder):
    assert qwen_image.tasks(folder) == ("t2i",)
    assert qwen_image.tasks(edit_folder) == ("t2i", "edit")


def test_errors_say_what_is_wrong(folder, tmp_path):
    with pytest.raises(UserError, match="multiples of 16, got 64 x 40"):
        qwen_image.latent_shape(folder, 64, 40)
    for load in (qwen_image.load_transformer, qwen_image.text_encoder, qwen_image.picture_codec, qwen_image.tasks):
        with pytest.raises(UserError, match=str(tmp_path)):
            load(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text((folder / "transformer" / "config.json").read_text())
    with pytest.raises(UserError, match=str(tmp_path)):  # no weights
        qwen_image.load_transformer(tmp_path)
    with pytest.raises(UserError, match="no noise levels for 1 step"):
        qwen_image.sigmas(folder, 1, HEIGHT, WIDTH)
    with pytest.raises(UserError, match="not a QwenImageTransformer2DModel"):
        qwen_image.load_transformer(folder / "vae")
