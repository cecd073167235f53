"""Serves Qwen-Image-2.1: one model for text-to-image and for editing with one or several source pictures.

A source picture's latents stand in the prompt, at the places that its text encoder saw the picture at, so that both
must see it at one size. A prompt's length sets where the picture that is drawn lies: prompts of other lengths are
forwards of their own.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from danceopd.models import loading
from danceopd.models.packing import each_length, in_whole_batches
from danceopd.models.prompts import Reader, reader

PIPELINES = ("QwenImage21Pipeline",)

BASE = "Qwen-Image-2.1"  # released, and not distilled to a few steps

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

PROMPTS_SEE_PICTURES = True

PROMPTS_HAVE_MASKS = True

MAX_SEQUENCE_LENGTH = 512  # of no meaning: the pipeline cuts no prompt

MAX_SOURCES = float("inf")

SCALE = 16  # pixels of a latent; a place in the prompt stands for 2 x 2 of them


def tasks(folder) -> tuple[str, ...]:
    """Returns ("t2i", "edit"), of every model of the family. Raises UserError if the folder is of another pipeline."""
    loading.class_name_of(folder, PIPELINES)
    return ("t2i", "edit")


def load_transformer(folder, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Loads the transformer of a pipeline folder, or of a transformer folder itself, in eval mode.

    Raises:
        UserError: It is not there, is another class, or lacks weights.
    """
    return loading.load_transformer(QwenImage21Transformer2DModel, folder, dtype)


def text_encoder(
    folder, device="cpu", dtype: torch.dtype = torch.float32, max_sequence_length: int = MAX_SEQUENCE_LENGTH
):
    """Loads the text encoder once; max_sequence_length is not looked at.

    Returns:
        encode(prompts, pictures=None) -> on the CPU "prompt_embeds" [n, L, C] in dtype, "prompt_mask" [n, L] bool,
        False after a prompt's end, "prompt_slots" [n, L] bool, True at the places of source pictures, and
        "prompt_parts" [n, 2] int64, how many places are pictures' and how many the text's. pictures: Per prompt a list
        of its source pictures [3, H, W] in [-1, 1], H and W multiples of 32.

    Raises:
        UserError: A part is missing.
    """
    folder = Path(folder)
    model = loading.load_model(Qwen3VLForConditionalGeneration, folder / "text_encoder", dtype).to(device)
    parts = {"text_encoder": model, "processor": loading.load(Qwen3VLProcessor, folder / "processor")}
    # The pipeline without the parts that draw: it holds the prompt template and its handling.
    pipeline = QwenImage21Pipeline(scheduler=None, vae=None, transformer=None, **parts)
    to_pil = VaeImageProcessor().postprocess

    @torch.no_grad()
    def encode(prompts: list[str], pictures: list[list[torch.Tensor]] | None = None) -> dict[str, torch.Tensor]:
        rows = []
        for prompt, own in zip(prompts, pictures or [[]] * len(prompts), strict=True):
            images = [to_pil(picture[None].float(), output_type="pil")[0] for picture in own]
            embeds, _, slots = pipeline._get_qwen_prompt_embeds([prompt], images or None, torch.device(device))
            rows.append((embeds[0].cpu(), slots[0].bool().cpu()))
        embeds, slots = (pad_sequence(values, batch_first=True) for values in zip(*rows, strict=True))
        lengths, seen = torch.tensor([len(row) for row, _ in rows]), slots.sum(1)
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
        parts = torch.stack([seen, lengths - seen], dim=1)
        return {"prompt_embeds": embeds, "prompt_mask": mask, "prompt_slots": slots, "prompt_parts": parts}

    return encode


def prompt_readers(folder, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    return [reader("processor", loading.load(Qwen3VLProcessor, Path(folder) / "processor").tokenizer, None)]


def picture_codec(folder, device="cpu", dtype: torch.dtype = torch.float32):
    """Loads the VAE, which has a fourth channel for how opaque a picture is: here it is wholly, and drawn as it comes.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w], normalised, and its inverse, in `dtype` on
        `device`, without gradient.

    Raises:
        UserError: The VAE is missing.
    """
    encode_any, decode_any = loading.film_codec(AutoencoderKLQwenImage21, folder, device, dtype)

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        latent_shape(folder, *pictures.shape[-2:])
        return encode_any(torch.cat([pictures, torch.ones_like(pictures[:, :1])], dim=1))

    return encode, lambda latents: decode_any(latents)[:, :3]


@loading.names_folder
def latent_shape(folder, height: int, width: int) -> tuple[int, ...]:
    """Returns (C, h, w) of one sample's noise. Raises UserError if a side is no multiple of two latents."""
    loading.check_size(height, width, 2 * SCALE)
    return loading.read_json(Path(folder) / "vae" / "config.json")["z_dim"], height // SCALE, width // SCALE


@loading.names_folder
def sigmas(folder, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns [N + 1] float32 from 1 to 0: the pipeline's noise levels for this picture size.

    Those that the folder names (sample_sigmas), which the pipeline draws with whatever number of steps it is asked for,
    are taken for that many steps alone.
    """
    _, h, w = latent_shape(folder, height, width)
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    ranges = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15)
    mu = calculate_shift(h * w, *(scheduler.config.get(*entry) for entry in ranges))
    levels = loading.read_json(Path(folder) / "model_index.json").get("sample_sigmas") or []
    if len(levels) != num_inference_steps:
        levels = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
    scheduler.set_timesteps(sigmas=levels, mu=mu)
    return scheduler.sigmas.float()


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
        prompt: Rows of text_encoder, without a mask where all are of one length. Others are a forward for each length,
            and one, in which the longest says where the picture lies, where ranks agree on the number of forwards.
        sources: Latents of the source pictures [B, C, h_i, w_i], in the order in which the text encoder saw them.
        guidance: Ignored.

    Returns:
        [B, C, h, w] in the latents' dtype.
    """

    def ask(*values):
        return _ask(transformer, *values)

    return (ask if in_whole_batches() else partial(each_length, ask))(latents, sigma, prompt, sources)


def _ask(transformer, latents, sigma, prompt, sources) -> torch.Tensor:
    """Asks for samples that share the places of their pictures."""
    pictures, dtype = (*sources, latents), loading.input_dtype(transformer)
    tokens = [picture.to(dtype).flatten(2).transpose(1, 2) for picture in pictures]
    slots, count = prompt["prompt_slots"], tokens[-1].shape[1]
    output = transformer(
        hidden_states=torch.cat(tokens, dim=1),
        encoder_hidden_states=prompt["prompt_embeds"].to(dtype),
        timestep=(1000 * sigma).to(dtype) / 1000,  # rounded as in the pipeline
        img_shapes=[[(1, *picture.shape[2:]) for picture in pictures]] * len(latents),
        img_mask=torch.cat([slots, slots.new_ones(len(latents), count // 4)], dim=1),
        encoder_hidden_states_mask=loading.mask_of(prompt, latents.device),
        return_dict=False,
    )[0]
    return output[:, -count:].transpose(1, 2).unflatten(2, latents.shape[2:]).to(latents.dtype)


def call_options(name: str, guidance_scale: float | None, size: tuple[int, int] | None) -> dict:
    """Returns the arguments of a pipeline's call, by its class's name, for a guidance and a size (None: its own)."""
    sizes = {} if size is None else {"height": size[0], "width": size[1]}
    if guidance_scale is None:
        return sizes
    negative = {"negative_prompt": " "} if guidance_scale > 1 else {}  # else there is no guidance
    return sizes | {"true_cfg_scale": guidance_scale} | negative
