"""Serves Krea 2 by diffusers' classes; latents are [B, C, h, w].

The pipeline's guidance_scale g is added to the conditional field, v + g (v - v_empty): alpha = 1 + g in
danceopd.core.fields.guided.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from diffusers.pipelines.krea2.pipeline_krea2 import calculate_shift
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen3VLModel

from danceopd.models import loading
from danceopd.models.prompts import Reader, reader

PIPELINES = ("Krea2Pipeline",)

BASE = "Krea 2's base (midtrain) weights"  # not distilled to a few steps

UNGUIDED = 0.0  # the pipeline's guidance_scale that asks for the conditional field alone

# Of the transformer's blocks; the text's own blocks before them see a token's layers, and are left as they are.
LORA_TARGETS = tuple(f"transformer_blocks.*.attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_gate", "to_out.0"))

PROMPTS_SEE_PICTURES = False

PROMPTS_HAVE_MASKS = True

MAX_SEQUENCE_LENGTH = 512  # tokens of a prompt and of what the template puts after it: the pipeline's default

MAX_SOURCES = 0


def tasks(folder) -> tuple[str, ...]:
    """Returns ("t2i",): the family does not edit. Raises UserError if the folder is of another pipeline."""
    loading.class_name_of(folder, PIPELINES)
    return ("t2i",)


def load_transformer(folder, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Loads the transformer of a pipeline folder, or of a transformer folder itself, in eval mode.

    Raises:
        UserError: It is not there, is another class, or lacks weights.
    """
    return loading.load_transformer(Krea2Transformer2DModel, folder, dtype)


def _index(folder) -> dict:
    """Reads the pipeline's own values."""
    return loading.read_json(Path(folder) / "model_index.json")


def _prompts(folder, **parts) -> Krea2Pipeline:
    """Makes the pipeline without the parts that draw: it holds the prompt template and its handling."""
    parts = dict.fromkeys(("scheduler", "vae", "transformer", "text_encoder")) | parts
    return Krea2Pipeline(text_encoder_select_layers=_index(folder).get("text_encoder_select_layers"), **parts)


def text_encoder(
    folder, device="cpu", dtype: torch.dtype = torch.float32, max_sequence_length: int = MAX_SEQUENCE_LENGTH
):
    """Loads the text encoder once.

    Returns:
        encode(prompts, pictures=None) -> {"prompt_embeds": [n, L, layers, C] in dtype, "prompt_mask": [n, L] bool}, on
        the CPU: several of the encoder's layers for each token, rows without the pipeline's padding and filled up at
        the end with zeros. The pictures are not looked at.

    Raises:
        UserError: A part is missing.
    """
    folder = Path(folder)
    tokenizer = loading.load(AutoTokenizer, folder / "tokenizer")
    model = loading.load_model(Qwen3VLModel, folder / "text_encoder", dtype).to(device)
    pipeline = _prompts(folder, tokenizer=tokenizer, text_encoder=model)

    @torch.no_grad()
    def encode(prompts: list[str], pictures=None) -> dict[str, torch.Tensor]:
        rows = []
        for prompt in prompts:
            embeds, mask = pipeline.get_text_hidden_states([prompt], max_sequence_length, torch.device(device))
            rows.append(embeds[0][mask[0]].cpu())  # all tokens lie in one place, so that padding may go
        lengths = torch.tensor([len(row) for row in rows])
        embeds = pad_sequence(rows, batch_first=True)
        return {"prompt_embeds": embeds, "prompt_mask": torch.arange(embeds.shape[1]) < lengths[:, None]}

    return encode


def prompt_readers(folder, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    tokenizer = loading.load(AutoTokenizer, Path(folder) / "tokenizer")
    pipeline = _prompts(folder, tokenizer=tokenizer)
    prefix, drop = pipeline.prompt_template_encode_prefix, pipeline.prompt_template_encode_start_idx
    limit = length - pipeline.prompt_template_encode_num_suffix_tokens
    return [reader("tokenizer", tokenizer, limit, lambda prompt: prefix + prompt, drop)]


def picture_codec(folder, device="cpu", dtype: torch.dtype = torch.float32):
    """Loads the VAE, Qwen-Image's.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w], normalised, and its inverse, in `dtype` on
        `device`, without gradient.

    Raises:
        UserError: The VAE is missing.
    """
    return loading.film_codec(AutoencoderKLQwenImage, folder, device, dtype)


@loading.names_folder
def latent_shape(folder, height: int, width: int) -> tuple[int, ...]:
    """Returns (C, h, w) of one sample's noise. Raises UserError if a side is no multiple of two latent pixels."""
    config = loading.read_json(Path(folder) / "vae" / "config.json")
    scale = 2 ** len(config["temperal_downsample"])
    loading.check_size(height, width, 2 * scale)
    return config["z_dim"], height // scale, width // scale


@loading.names_folder
def sigmas(folder, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns [N + 1] float32 from 1 to 0: the pipeline's noise levels for this picture size."""
    _, h, w = latent_shape(folder, height, width)
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    ranges = ("base_image_seq_len", 256), ("max_image_seq_len", 6400), ("base_shift", 0.5), ("max_shift", 1.15)
    mu = calculate_shift(h * w // 4, *(scheduler.config.get(*entry) for entry in ranges))
    if _index(folder).get("is_distilled"):
        mu = 1.15
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), mu=mu)
    return scheduler.sigmas


def velocity(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    prompt: dict[str, torch.Tensor],
    sources: tuple[torch.Tensor, ...] = (),
    guidance: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Asks the transformer for the velocity noise - data.

    Args:
        transformer: Of this family.
        latents: [B, C, h, w].
        sigma: [B].
        prompt: Rows of text_encoder, without a mask where all are of one length.
        sources: None: the family does not edit.
        guidance: Ignored.

    Returns:
        [B, C, h, w] in the latents' dtype.
    """
    dtype, embeds, (height, width) = loading.input_dtype(transformer), prompt["prompt_embeds"], latents.shape[2:]
    tokens = transformer(
        hidden_states=loading.pack(latents.to(dtype)),
        encoder_hidden_states=embeds.to(dtype),
        timestep=(1000 * sigma / 1000).to(dtype),  # rounded as in the pipeline
        position_ids=Krea2Pipeline.prepare_position_ids(embeds.shape[1], height // 2, width // 2, latents.device),
        encoder_attention_mask=loading.mask_of(prompt, latents.device),
        return_dict=False,
    )[0]
    return loading.unpack(tokens, height, width).to(latents.dtype)
