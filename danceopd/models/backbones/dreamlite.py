"""Serves DreamLite, whose small UNet draws and edits; latents are [B, C, h, w].

It sees two pictures of one size side by side, the one that it draws and the one to edit, which is blank where there is
none. The pipeline's image_guidance_scale is 1 here: guidance is between prompts alone.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DreamLitePipeline, DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.dreamlite.pipeline_dreamlite import calculate_shift
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from danceopd.models import loading
from danceopd.models.prompts import Reader, reader
from danceopd.support.errors import UserError

PIPELINES = ("DreamLitePipeline",)

BASE = "DreamLite (not its mobile variant)"  # not distilled to a few steps

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

PROMPTS_SEE_PICTURES = True

PROMPTS_HAVE_MASKS = True

MAX_SEQUENCE_LENGTH = 200  # tokens of a prompt without a picture: the pipeline's default; those with one are not cut

MAX_SOURCES = 1

SCALE = 8  # pixels of a latent

# What the pipeline puts before a prompt, though not before the empty one that guidance asks with.
DRAW = "[Generate]: "
EDIT = "[Edit]: A diptych with two side-by-side images of the same scene. Compared to the right side, the left one has "


def tasks(folder) -> tuple[str, ...]:
    """Returns ("t2i", "edit"), of every model of the family. Raises UserError if the folder is of another pipeline."""
    loading.class_name_of(folder, PIPELINES)
    return ("t2i", "edit")


def load_transformer(folder, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Loads the UNet of a pipeline folder, or of a folder of its own, in eval mode.

    Raises:
        UserError: It is not there, is another class, or lacks weights.
    """
    return loading.load_transformer(DreamLiteUNetModel, folder, dtype)


def text_encoder(
    folder, device="cpu", dtype: torch.dtype = torch.float32, max_sequence_length: int = MAX_SEQUENCE_LENGTH
):
    """Loads the text encoder once.

    Returns:
        encode(prompts, pictures=None) -> {"prompt_embeds": [n, L, C] in dtype, "prompt_mask": [n, L] bool}, on the CPU,
        rows filled up at the end with zeros. pictures: Per prompt a list of at most one picture to edit [3, H, W] in
        [-1, 1], which the encoder is shown at 512 x 512 pixels.

    Raises:
        UserError: A part is missing.
    """
    folder = Path(folder)
    parts = dict.fromkeys(("scheduler", "vae", "unet")) | {
        "text_encoder": loading.load_model(Qwen3VLForConditionalGeneration, folder / "text_encoder", dtype).to(device),
        "tokenizer": loading.load(AutoTokenizer, folder / "tokenizer"),
        "processor": loading.load(Qwen3VLProcessor, folder / "processor"),
    }
    # The pipeline without the parts that draw: it holds the prompt templates and their handling.
    pipeline, to_pil = DreamLitePipeline(**parts), VaeImageProcessor().postprocess

    @torch.no_grad()
    def encode(prompts: list[str], pictures: list[list[torch.Tensor]] | None = None) -> dict[str, torch.Tensor]:
        rows = []
        for prompt, own in zip(prompts, pictures or [[]] * len(prompts), strict=True):
            text = prompt and (EDIT if own else DRAW) + prompt
            image = to_pil(own[0][None].float(), output_type="pil")[0] if own else None
            where = {"device": torch.device(device), "dtype": dtype, "max_sequence_length": max_sequence_length}
            embeds, _ = pipeline.encode_prompt("edit" if own else "generate", [text], image=image, **where)
            rows.append(embeds[0].cpu())
        lengths = torch.tensor([len(row) for row in rows])
        embeds = pad_sequence(rows, batch_first=True)
        return {"prompt_embeds": embeds, "prompt_mask": torch.arange(embeds.shape[1]) < lengths[:, None]}

    return encode


def prompt_readers(folder, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    tokenizer = loading.load(AutoTokenizer, Path(folder) / "tokenizer")
    names = ("scheduler", "vae", "unet", "text_encoder", "processor")
    pipeline = DreamLitePipeline(tokenizer=tokenizer, **dict.fromkeys(names))
    template, drop = pipeline.prompt_template_encode_generate, pipeline.prompt_template_encode_generate_start_idx
    return [reader("tokenizer", tokenizer, length, lambda prompt: template.format(DRAW + prompt), drop)]


def picture_codec(folder, device="cpu", dtype: torch.dtype = torch.float32):
    """Loads the VAE.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w] and its inverse, in `dtype` on `device`,
        without gradient.

    Raises:
        UserError: The VAE is missing.
    """
    vae = loading.load_model(AutoencoderTiny, Path(folder) / "vae", dtype).to(device)
    shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor

    @torch.no_grad()
    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return vae.encode(pictures.to(device, dtype)).latents  # as they are: the pipeline scales none either

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(device, dtype) / scale + shift).sample.clamp(-1, 1)

    return encode, decode


@loading.names_folder
def latent_shape(folder, height: int, width: int) -> tuple[int, ...]:
    """Returns (C, h, w) of one sample's noise. Raises UserError if a side is no multiple of what the UNet halves."""
    halved = 2 ** (len(loading.read_json(Path(folder) / "unet" / "config.json")["block_out_channels"]) - 1)
    loading.check_size(height, width, SCALE * halved)
    channels = loading.read_json(Path(folder) / "vae" / "config.json")["latent_channels"]
    return channels, height // SCALE, width // SCALE


@loading.names_folder
def sigmas(folder, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns [N + 1] float32 from 1 to 0: the pipeline's noise levels for this picture size."""
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    _, h, w = latent_shape(folder, height, width)
    ranges = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.16)
    mu = calculate_shift(h * w // 4, *(scheduler.config.get(*entry) for entry in ranges))
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
    """Asks the UNet for the velocity noise - data.

    Args:
        transformer: The UNet.
        latents: [B, C, h, w].
        sigma: [B].
        prompt: Rows of text_encoder, without a mask where all are of one length.
        sources: Latents of the picture to edit, of the latents' shape, or none.
        guidance: Ignored.

    Returns:
        [B, C, h, w] in the latents' dtype.

    Raises:
        UserError: The picture to edit is of another size.
    """
    dtype, (height, width) = loading.input_dtype(transformer), latents.shape[2:]
    beside = sources[0] if sources else torch.zeros_like(latents)
    if beside.shape != latents.shape:
        size = " x ".join(str(SCALE * side) for side in beside.shape[2:])
        raise UserError(
            f"DreamLite edits pictures of the size that it draws, {SCALE * height} x {SCALE * width}, not {size}; "
            "prepare rows whose target has its source's shape"
        )
    size = torch.stack([torch.full_like(sigma, SCALE * side) for side in (width, height)], dim=1)
    return transformer(
        torch.cat([latents, beside], dim=3).to(dtype),
        timestep=(1000 * sigma).to(dtype),
        encoder_hidden_states=prompt["prompt_embeds"].to(dtype),
        encoder_attention_mask=loading.mask_of(prompt, latents.device),
        added_cond_kwargs={"time_ids": size.to(dtype)},
        return_dict=False,
    )[0][..., :width].to(latents.dtype)


def call_options(name: str, guidance_scale: float | None, size: tuple[int, int] | None) -> dict:
    """Returns the arguments of a pipeline's call, by its class's name, for a guidance and a size (None: its own)."""
    options = {} if size is None else {"height": size[0], "width": size[1]}
    if guidance_scale is None:
        return options
    return options | {"guidance_scale": guidance_scale, "image_guidance_scale": 1.0}
