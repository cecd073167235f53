"""Serves FLUX.2 dev and klein: one model for text-to-image and for editing with one or several source pictures.

Latents are the VAE's, in 2x2 patches and normalised by its batch norm: [B, 128, height / 16, width / 16]. The
distilled klein takes no guidance, klein-base true classifier-free guidance, dev an embedded guidance number.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, compute_empirical_mu, format_input
from torch import nn
from transformers import AutoProcessor, Mistral3ForConditionalGeneration, Qwen2TokenizerFast, Qwen3ForCausalLM

from danceopd.models import loading
from danceopd.models.prompts import Reader, chat_reader, special_tokens
from danceopd.support.errors import UserError

PIPELINES = ("Flux2KleinPipeline", "Flux2Pipeline")

BASE = "FLUX.2-klein-base-4B or FLUX.2-klein-base-9B"  # released, and not distilled to a few steps

DISTILLED_WITHOUT_BASE = "klein"  # names with this word and without "base" are of step-distilled weights

PROMPTS_SEE_PICTURES = False

PROMPTS_HAVE_MASKS = False

MAX_SEQUENCE_LENGTH = 512  # tokens of a prompt, template and padding included: the pipelines' default

MAX_SOURCES = float("inf")

SOURCE_LIMITS = (64, 8)  # of a picture to edit, as the pipelines check it: its least side, its longest ratio of sides

# Of double blocks, and of single blocks, which fuse q, k and v with the MLP. Only a single block's to_out is a linear
# layer (see shared_base.target_layers; PEFT by itself would stumble over a double block's, which is a list).
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("to_qkv_mlp_proj", "to_out"),
)


def tasks(folder) -> tuple[str, ...]:
    """Returns ("t2i", "edit"), of every model of the family. Raises UserError if the folder is of another pipeline."""
    loading.class_name_of(folder, PIPELINES)
    return ("t2i", "edit")


def load_transformer(folder, dtype=torch.float32) -> nn.Module:
    """Loads the Flux2Transformer2DModel of a pipeline folder, or of a transformer folder itself, in eval mode.

    Raises:
        UserError: The folder, its config or some of its weights are missing.
    """
    return loading.load_transformer(Flux2Transformer2DModel, folder, dtype)


def text_encoder(folder, device="cpu", dtype=torch.float32, max_sequence_length=MAX_SEQUENCE_LENGTH):
    """Loads the text encoder once; the pipelines do not mask the padding, so every prompt has all rows.

    Returns:
        encode(prompts, pictures=None) -> {"prompt_embeds": [n, max_sequence_length, C]} in `dtype` on the CPU, C the
        width of three layers; the pictures are not looked at.

    Raises:
        UserError: Something is missing.
    """
    folder = Path(folder)
    if loading.class_name_of(folder, PIPELINES) == "Flux2Pipeline":
        model, tokenizer = Mistral3ForConditionalGeneration, AutoProcessor  # a PixtralProcessor needs torchvision
        embed = Flux2Pipeline._get_mistral_3_small_prompt_embeds
    else:
        model, tokenizer, embed = Qwen3ForCausalLM, Qwen2TokenizerFast, Flux2KleinPipeline._get_qwen3_prompt_embeds
    tokenizer = loading.load(tokenizer, folder / "tokenizer")
    # Without the language model's head: tokens x vocabulary logits a prompt that nobody reads.
    model = loading.load_model(model, folder / "text_encoder", dtype).model.to(device)

    @torch.no_grad()
    def encode(prompts, pictures=None):
        return {"prompt_embeds": embed(model, tokenizer, list(prompts), max_sequence_length=max_sequence_length).cpu()}

    return encode


def prompt_readers(folder, length) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    folder = Path(folder)
    if loading.class_name_of(folder, PIPELINES) != "Flux2Pipeline":
        return [chat_reader(loading.load(Qwen2TokenizerFast, folder / "tokenizer"), length, enable_thinking=False)]
    processor = loading.load(AutoProcessor, folder / "tokenizer")

    def lengths(prompts: list[str]) -> list[int]:
        messages = format_input(prompts=list(prompts), system_message=SYSTEM_MESSAGE)
        told = processor.apply_chat_template(messages, add_generation_prompt=False, tokenize=True, return_dict=True)
        return [len(ids) for ids in told["input_ids"]]

    return [Reader("tokenizer", length, lengths, special_tokens(getattr(processor, "tokenizer", processor)))]


def picture_codec(folder, device="cpu", dtype=torch.float32):
    """Loads the VAE.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, H / 16, W / 16] and its inverse, without gradient;
        encode raises UserError for a size that does not fit.

    Raises:
        UserError: The VAE is missing.
    """
    vae = loading.load_model(AutoencoderKLFlux2, Path(folder) / "vae", dtype).to(device)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)

    @torch.no_grad()
    def encode(pictures):
        latent_shape(folder, *pictures.shape[-2:])
        latents = vae.encode(pictures.to(device, dtype)).latent_dist.mode()
        return (Flux2Pipeline._patchify_latents(latents) - mean) / std

    @torch.no_grad()
    def decode(latents):
        latents = Flux2Pipeline._unpatchify_latents(latents.to(device, dtype) * std + mean)
        return vae.decode(latents, return_dict=False)[0].clamp(-1, 1)

    return encode, decode


@loading.names_folder
def latent_shape(folder, height, width) -> tuple[int, int, int]:
    """Returns (C, height / 16, width / 16). Raises UserError if height or width is not a positive multiple of 16."""
    config = loading.read_json(Path(folder) / "vae" / "config.json")
    multiple = 2 ** len(config["block_out_channels"])  # the VAE halves between its blocks, the 2x2 patches once more
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise UserError(f"height and width must be multiples of {multiple}, got {height} x {width}")
    return 4 * config["latent_channels"], height // multiple, width // multiple


@loading.names_folder
def sigmas(folder, num_inference_steps, height, width) -> torch.Tensor:
    """Returns [num_inference_steps + 1] float32 from 1 to 0, shifted for the number of picture tokens and of steps."""
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    _, h, w = latent_shape(folder, height, width)
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    grid = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    scheduler.set_timesteps(sigmas=grid, mu=compute_empirical_mu(h * w, num_inference_steps))
    return scheduler.sigmas


@lru_cache(maxsize=64)
def _position_ids(text_length, size, source_sizes, device):
    """Returns ids of the text [L, 4], and of the picture and its source pictures [N, 4], kept on the device."""
    shapes = [torch.empty(1, 1, *s, device="meta") for s in (size, *source_sizes)]
    text = Flux2Pipeline._prepare_text_ids(torch.empty(1, text_length, 1, device="meta"))[0]
    picture = [Flux2Pipeline._prepare_latent_ids(shapes[0])[0]]
    if source_sizes:  # each reference has its own time: 10, 20, ...
        picture.append(Flux2Pipeline._prepare_image_ids(shapes[1:])[0])
    return text.to(device), torch.cat(picture).to(device)


def velocity(transformer, latents, sigma, prompt, sources=(), guidance=None) -> torch.Tensor:
    """Asks the transformer for the velocity noise - data.

    Args:
        transformer: Of this family.
        latents: [B, C, h, w].
        sigma: [B].
        prompt: {"prompt_embeds": [B, L, C]}.
        sources: Latents of the source pictures, each [B, C, h_i, w_i].
        guidance: A number or [B], which dev needs and klein ignores.

    Returns:
        [B, C, h, w] in the latents' dtype.

    Raises:
        UserError: The guidance is needed and missing.
    """
    dtype, size = loading.input_dtype(transformer), latents.shape[-2:]
    if not transformer.config.guidance_embeds:
        guidance = None
    elif guidance is None:
        raise UserError("this transformer embeds the guidance scale: give guidance (FLUX.2 dev's pipeline uses 4)")
    elif not isinstance(guidance, torch.Tensor):
        guidance = torch.full((len(latents),), float(guidance), device=latents.device)
    pictures = [x.to(dtype) for x in (latents, *sources)]
    embeds = prompt["prompt_embeds"].to(dtype)
    source_sizes = tuple(tuple(x.shape[-2:]) for x in sources)
    text_ids, picture_ids = _position_ids(embeds.shape[1], tuple(size), source_sizes, latents.device)
    tokens = transformer(
        hidden_states=torch.cat([Flux2Pipeline._pack_latents(x) for x in pictures], dim=1),
        timestep=(1000 * sigma).to(dtype) / 1000,  # rounded as in the pipelines
        guidance=guidance,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=picture_ids,
        return_dict=False,
    )[0]
    tokens = tokens[:, : size[0] * size[1]]
    return tokens.transpose(1, 2).unflatten(2, size).to(latents.dtype)
