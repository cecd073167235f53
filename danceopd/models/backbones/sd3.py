"""Serves Stable Diffusion 3 and 3.5 from a diffusers pipeline folder.

The transformer takes the picture as it is, [B, C, h, w], and always the same number of text tokens, so there is
nothing to pack and nothing to mask.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from danceopd.models import loading
from danceopd.models.prompts import Reader, reader
from danceopd.support.errors import UserError

PIPELINES = ("StableDiffusion3Pipeline",)

BASE = "stable-diffusion-3.5-medium or stable-diffusion-3.5-large"  # released, and not distilled to a few steps

PROMPTS_SEE_PICTURES = False

PROMPTS_HAVE_MASKS = False

MAX_SOURCES = 0

# Of the joint attention and of the second attention that SD3.5-medium's first blocks have (attn2).
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

MAX_SEQUENCE_LENGTH = 256  # T5 tokens, padding included: the pipeline's default

TIMESTEPS = 1000  # the transformer's time is sigma times this


def tasks(folder: str | Path) -> tuple[str, ...]:
    """Returns ("t2i",): the family does not edit. Raises UserError if the folder is of another pipeline."""
    loading.class_name_of(folder, PIPELINES)
    return ("t2i",)


def load_transformer(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Loads the transformer of a pipeline folder, or of a transformer folder itself, in eval mode on the CPU.

    Raises:
        UserError: It is not there, cannot be read, or lacks weights.
    """
    return loading.load_transformer(SD3Transformer2DModel, folder, dtype)


def text_encoder(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
) -> Callable[..., dict[str, torch.Tensor]]:
    """Loads two CLIPs and the T5 once.

    Returns:
        encode(prompts), on the CPU in `dtype`: "prompt_embeds" [n, L, C], the CLIPs' tokens side by side and padded
        with zeros to T5's width C, then T5's max_sequence_length; "pooled_prompt_embeds" [n, C'], the CLIPs' pooled
        vectors. Where model_index.json has null for text_encoder_3 the T5 tokens are zeros, as in the pipeline.

    Raises:
        UserError: Something is missing or cannot be read.
    """
    folder, clips = Path(folder), []
    for suffix in ("", "_2"):
        tokenizer = loading.load_tokenizer(CLIPTokenizer, folder / f"tokenizer{suffix}")
        model = loading.load_model(CLIPTextModelWithProjection, folder / f"text_encoder{suffix}", dtype)
        clips.append((tokenizer, model.to(device)))
    clip_length = clips[0][0].model_max_length  # of both, as in the pipeline
    width = loading.read_json(folder / "transformer" / "config.json")["joint_attention_dim"]
    t5 = None
    if _has_t5(folder):
        t5_tokenizer = loading.load_tokenizer(T5TokenizerFast, folder / "tokenizer_3")
        t5 = loading.load_model(T5EncoderModel, folder / "text_encoder_3", dtype).to(device)

    def tokens(tokenizer, prompts, length):
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(prompts, **options).input_ids.to(device)

    @torch.no_grad()
    def encode(prompts: list[str], pictures: list | None = None) -> dict[str, torch.Tensor]:
        outputs = [model(tokens(tok, prompts, clip_length), output_hidden_states=True) for tok, model in clips]
        clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        clip = nn.functional.pad(clip, (0, width - clip.shape[-1]))
        if t5 is None:
            long = clip.new_zeros(len(prompts), max_sequence_length, width)
        else:
            long = t5(tokens(t5_tokenizer, prompts, max_sequence_length))[0]
        return {
            "prompt_embeds": torch.cat([clip, long.to(clip.dtype)], dim=1).cpu(),
            "pooled_prompt_embeds": torch.cat([output.text_embeds for output in outputs], dim=-1).cpu(),
        }

    return encode


def prompt_readers(folder: Path | str, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    folder = Path(folder)
    first, second = (loading.load_tokenizer(CLIPTokenizer, folder / f"tokenizer{end}") for end in ("", "_2"))
    readers = [reader(n, t, first.model_max_length) for n, t in (("tokenizer", first), ("tokenizer_2", second))]
    if _has_t5(folder):
        t5 = loading.load_tokenizer(T5TokenizerFast, folder / "tokenizer_3")
        readers.append(reader("tokenizer_3", t5, length))
    return readers


def picture_codec(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Loads the VAE.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w], the mode of the posterior, and its inverse, on
        `device` in `dtype`, without gradient.

    Raises:
        UserError: The VAE is missing.
    """
    return loading.picture_codec(folder, device, dtype)


@loading.names_folder
def latent_shape(folder: str | Path, height: int, width: int) -> tuple[int, ...]:
    """Returns (C, h, w) of one sample's noise for a picture of height x width pixels.

    Raises:
        UserError: They are no multiple of a patch's pixels or exceed the transformer's position table.
    """
    transformer = loading.read_json(Path(folder) / "transformer" / "config.json")
    factor = 2 ** (len(loading.read_json(Path(folder) / "vae" / "config.json")["block_out_channels"]) - 1)
    multiple = factor * transformer["patch_size"]
    largest = multiple * transformer["pos_embed_max_size"]
    for side in (height, width):
        if side < 1 or side % multiple or side > largest:
            raise UserError(
                f"{folder}: a picture of {height}x{width} does not fit; "
                f"height and width must be multiples of {multiple}, at most {largest}"
            )
    return transformer["in_channels"], height // factor, width // factor


@loading.names_folder
def sigmas(folder: str | Path, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns the pipeline's noise levels [N + 1] float32, descending to 0, for a picture of height x width pixels.

    The size matters only where the scheduler's config has use_dynamic_shifting; a UserError as from latent_shape.
    """
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    config, mu = scheduler.config, None
    if config.use_dynamic_shifting:
        _, rows, columns = latent_shape(folder, height, width)
        patch = loading.read_json(Path(folder) / "transformer" / "config.json")["patch_size"]
        lengths = (config.base_image_seq_len, config.max_image_seq_len)
        mu = calculate_shift((rows // patch) * (columns // patch), *lengths, config.base_shift, config.max_shift)
    scheduler.set_timesteps(num_inference_steps, mu=mu)
    return scheduler.sigmas.float()


def velocity(
    transformer: nn.Module,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    prompt: dict[str, torch.Tensor],
    sources: tuple[torch.Tensor, ...] = (),
    guidance: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Asks the transformer for the velocity noise - data, differentiable in its parameters.

    Args:
        transformer: Of this family.
        latents: [B, C, h, w].
        sigma: [B].
        prompt: Rows of text_encoder.
        sources: None: the family does not edit.
        guidance: Ignored: no model of this family embeds it.

    Returns:
        [B, C, h, w] in the latents' dtype.

    Raises:
        UserError: There are sources.
    """
    if len(sources):
        raise UserError("Stable Diffusion 3 takes no source pictures; use a model that edits")
    dtype = loading.input_dtype(transformer)  # the patch embedding's, which has no adapter of another dtype
    answer = transformer(
        hidden_states=latents.to(dtype),
        timestep=sigma.float() * TIMESTEPS,
        encoder_hidden_states=prompt["prompt_embeds"].to(dtype),
        pooled_projections=prompt["pooled_prompt_embeds"].to(dtype),
        return_dict=False,
    )[0]
    return answer.to(latents.dtype)


def _has_t5(folder: str | Path) -> bool:
    """Returns whether model_index.json names a text_encoder_3; without that file, whether its folder is there."""
    index, there = Path(folder) / "model_index.json", (Path(folder) / "text_encoder_3").is_dir()
    if not index.is_file():
        return there
    named = loading.read_json(index).get("text_encoder_3", [None, None])[0] is not None
    if named and not there:
        raise UserError(f"{folder}: no text_encoder_3 folder; to go without T5 set it to [null, null] in {index.name}")
    return named
