"""Serves FLUX.1 (dev, schnell) and FLUX.1 Kontext by diffusers' classes; latents are [B, C, h, w]."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from danceopd.models import loading
from danceopd.models.prompts import Reader, reader
from danceopd.support.errors import UserError

PIPELINES = ("FluxPipeline", "FluxKontextPipeline")

BASE = "FLUX.1-dev or FLUX.1-Kontext-dev"  # released, and not distilled to a few steps

# Both streams of a double block; a single block's output projection is one with its MLP's, and stays as it is.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

PROMPTS_SEE_PICTURES = False

PROMPTS_HAVE_MASKS = False

MAX_SOURCES = 1  # Kontext was trained with one, and its pipeline takes no more

MAX_SEQUENCE_LENGTH = 512  # T5 tokens, padding included: the pipelines' default


def tasks(folder) -> tuple[str, ...]:
    """Returns ("t2i",) for a FLUX pipeline folder, ("t2i", "edit") for a Kontext one. Raises UserError for another."""
    return ("t2i", "edit") if loading.class_name_of(folder, PIPELINES) == "FluxKontextPipeline" else ("t2i",)


def distilled_scheduler(folder, scheduler: dict) -> str | None:
    """Says what shows FLUX.1 schnell, by its scheduler's values; None for others."""
    if scheduler.get("shift") == 1 and not scheduler.get("use_dynamic_shifting"):
        return "its scheduler, which shifts no noise level, as FLUX.1 schnell's"


def load_transformer(folder, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Loads the FluxTransformer2DModel of a pipeline folder, or of a transformer folder itself, in eval mode.

    Raises:
        UserError: It is not there, is another class, or lacks weights.
    """
    return loading.load_transformer(FluxTransformer2DModel, folder, dtype)


def text_encoder(
    folder, device="cpu", dtype: torch.dtype = torch.float32, max_sequence_length: int = MAX_SEQUENCE_LENGTH
) -> Callable:
    """Loads CLIP and T5 once.

    Args:
        folder: The pipeline's.
        device: Where they compute.
        dtype: Of weights and encodings.
        max_sequence_length: T5 tokens of a prompt.

    Returns:
        encode(prompts, pictures) -> prompt_embeds [n, max_sequence_length, C] (T5) and pooled_prompt_embeds [n, C]
        (CLIP), on the CPU; the pictures are not looked at.

    Raises:
        UserError: A part is missing.
    """
    folder = Path(folder)
    clip_tokenizer = loading.load_tokenizer(CLIPTokenizer, folder / "tokenizer")
    t5_tokenizer = loading.load_tokenizer(T5TokenizerFast, folder / "tokenizer_2")
    clip = loading.load_model(CLIPTextModel, folder / "text_encoder", dtype).to(device)
    t5 = loading.load_model(T5EncoderModel, folder / "text_encoder_2", dtype).to(device)

    def tokens(tokenizer, prompts, length):
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(prompts, **options).input_ids.to(device)

    @torch.no_grad()
    def encode(prompts: list[str], pictures=None) -> dict[str, torch.Tensor]:
        pooled = clip(tokens(clip_tokenizer, prompts, clip_tokenizer.model_max_length)).pooler_output
        # No mask: FLUX was trained to attend to the padding too.
        embeds = t5(tokens(t5_tokenizer, prompts, max_sequence_length)).last_hidden_state
        return {"prompt_embeds": embeds.cpu(), "pooled_prompt_embeds": pooled.cpu()}

    return encode


def prompt_readers(folder, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    folder = Path(folder)
    clip = loading.load_tokenizer(CLIPTokenizer, folder / "tokenizer")
    t5 = loading.load_tokenizer(T5TokenizerFast, folder / "tokenizer_2")
    return [reader("tokenizer", clip, clip.model_max_length), reader("tokenizer_2", t5, length)]


def picture_codec(folder, device="cpu", dtype: torch.dtype = torch.float32) -> tuple[Callable, Callable]:
    """Loads the VAE.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w] and its inverse, on `device` in `dtype`; encode
        raises UserError for a size that does not fit.
    """
    encode_any, decode = loading.picture_codec(folder, device, dtype)

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        latent_shape(folder, *pictures.shape[-2:])
        return encode_any(pictures)

    return encode, decode


@loading.names_folder
def latent_shape(folder, height: int, width: int) -> tuple[int, ...]:
    """Returns (C, h, w) of one sample's noise. Raises UserError if height or width is no multiple of 16 (8 VAE, 2
    packing).
    """
    config = loading.read_json(Path(folder) / "vae" / "config.json")
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    if height % (2 * scale) or width % (2 * scale) or min(height, width) < 1:
        raise UserError(f"FLUX pictures must have sides that are multiples of {2 * scale}, got {height} x {width}")
    return config["latent_channels"], height // scale, width // scale


@loading.names_folder
def sigmas(folder, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns [N + 1] float32 from 1 to 0: the pipelines' default noise levels for this picture size."""
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    _, h, w = latent_shape(folder, height, width)
    config = scheduler.config
    ends = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    levels = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
    scheduler.set_timesteps(sigmas=levels, mu=calculate_shift(h // 2 * (w // 2), *ends))
    return scheduler.sigmas


def velocity(
    transformer: nn.Module,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    prompt: dict[str, torch.Tensor],
    sources: tuple[torch.Tensor, ...] = (),
    guidance: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Asks the transformer for the velocity noise - data.

    Args:
        transformer: Of this family; one that draws takes no sources, whether Kontext or not.
        latents: [B, C, h, w].
        sigma: [B].
        prompt: Rows of text_encoder.
        sources: Latents of the source pictures, each [B, C, h_i, w_i].
        guidance: A number or [B], embedded by a distilled model and ignored by others.

    Returns:
        [B, C, h, w], as the latents.

    Raises:
        UserError: A distilled model gets no guidance.
    """
    batch, channels, height, width = latents.shape
    device, dtype = latents.device, loading.input_dtype(transformer)
    if not transformer.config.guidance_embeds:
        guidance = None
    elif guidance is None:
        raise UserError("this FLUX transformer embeds the guidance scale (guidance_embeds): give one, such as 3.5")
    elif isinstance(guidance, torch.Tensor):
        guidance = guidance.to(device, torch.float32).expand(batch)
    else:
        guidance = torch.full((batch,), float(guidance), device=device)
    embeds = prompt["prompt_embeds"].to(dtype)
    packed = [FluxPipeline._pack_latents(x.to(dtype), batch, channels, *x.shape[-2:]) for x in (latents, *sources)]
    output = transformer(
        hidden_states=torch.cat(packed, dim=1),
        timestep=sigma,
        guidance=guidance,
        pooled_projections=prompt["pooled_prompt_embeds"].to(dtype),
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=device),
        img_ids=_positions(latents, sources),
        return_dict=False,
    )[0]
    output = output[:, : packed[0].shape[1]]
    return FluxPipeline._unpack_latents(output, height, width, vae_scale_factor=1).to(latents.dtype)


def _positions(latents: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns [tokens, 3] float32: (kind, row, column) of every token, of kind 0 in the latents and 1 in the sources.

    Kontext knows one source, whose grid begins at 0. Several are laid out as tiles of one picture, each to the right
    of all before it or below them, whichever keeps the whole the squarer: the layout of ComfyUI's "offset" method.
    """
    bottom = right = 0
    with torch.device(latents.device):  # built there, such that nothing is copied and waited for
        parts = [FluxPipeline._prepare_latent_image_ids(1, *_tokens(latents), latents.device, torch.float32)]
        for source in sources:
            rows, columns = _tokens(source)
            top, left = (0, right) if bottom + rows > right + columns else (bottom, 0)
            ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, latents.device, torch.float32)
            ids[:, 0] += 1
            ids[:, 1] += top
            ids[:, 2] += left
            parts.append(ids)
            bottom, right = max(bottom, top + rows), max(right, left + columns)
        return torch.cat(parts)


def _tokens(latents: torch.Tensor) -> tuple[int, int]:
    """Returns the rows and columns of tokens, each of 2 x 2 latents."""
    return latents.shape[-2] // 2, latents.shape[-1] // 2


def call_options(name: str, guidance_scale: float | None, size: tuple[int, int] | None) -> dict:
    """Returns the arguments of a pipeline's call, by its class's name, for a guidance and a size (None: its own)."""
    options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if size is None:
        return options
    options |= {"height": size[0], "width": size[1]}
    if name == "FluxKontextPipeline":  # which else takes sizes of its own for picture and edit
        options |= {"_auto_resize": False, "max_area": size[0] * size[1]}
    return options
