"""Serves Qwen-Image and Qwen-Image-Edit-Plus by diffusers' classes.

A folder of either pipeline serves: both hold the same transformer and VAE classes. The Edit-Plus text encoder also
looks at the source pictures, and the transformer sees each one's latents after those of the picture it draws.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.models import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage, pipeline_qwenimage_edit_plus
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor

from danceopd.models import loading
from danceopd.models.prompts import Reader, reader
from danceopd.support.errors import UserError

PIPELINES = ("QwenImagePipeline", "QwenImageEditPlusPipeline")

BASE = "Qwen-Image-2512 or Qwen-Image-Edit-2511"  # released, and not distilled to a few steps

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # those of diffusers' own LoRA script for Qwen-Image

EDIT_ONLY = ("QwenImageEditPlusPipeline",)  # pipelines that do not draw without a picture

PROMPTS_SEE_PICTURES = True  # where the folder edits

PROMPTS_HAVE_MASKS = True

MAX_SOURCES = float("inf")  # where the folder edits

MAX_SEQUENCE_LENGTH = 512  # tokens of a prompt: the text-to-image pipeline's default; the editing one does not cut


def tasks(folder) -> tuple[str, ...]:
    """Returns ("t2i",) or ("t2i", "edit"): a text-to-image folder has no processor to show its encoder a picture."""
    return ("t2i", "edit") if loading.class_name_of(folder, PIPELINES) == "QwenImageEditPlusPipeline" else ("t2i",)


def distilled_scheduler(folder, scheduler: dict) -> str | None:
    """Says what shows a lightning variant, by its scheduler's values; None for others."""
    if scheduler.get("use_dynamic_shifting") and scheduler.get("base_shift", 0.5) == scheduler.get("max_shift", 1.15):
        return "its scheduler, which shifts pictures of every size alike, as Qwen-Image-Lightning's"


def load_transformer(folder, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Loads the transformer of a pipeline folder, or of a transformer folder itself, in eval mode.

    Raises:
        UserError: The folder or its weights (safetensors, sharded or not) are missing.
    """
    return loading.load_transformer(QwenImageTransformer2DModel, folder, dtype)


def text_encoder(
    folder, device="cpu", dtype: torch.dtype = torch.float32, max_sequence_length: int = MAX_SEQUENCE_LENGTH
):
    """Loads the text encoder once.

    The encoder counts a picture's tokens as the installed diffusers does: with transformers 5, one after another
    instead of by row and column, until diffusers' issue 14194 is closed.

    Returns:
        encode(prompts, pictures=None) -> {"prompt_embeds": [n, L, C] in dtype, "prompt_mask": [n, L] bool}, on the CPU,
        rows padded at the end with zeros. pictures: Per prompt a list of its source pictures [3, H, W] in [-1, 1], in
        their order; only an Edit-Plus folder looks at them, each resized to about 384 x 384 pixels of its own shape.

    Raises:
        UserError: The folder is not one of PIPELINES or lacks a part; Edit-Plus needs torchvision installed.
    """
    folder, edits = Path(folder), "edit" in tasks(folder)
    parts = {
        "text_encoder": loading.load_model(Qwen2_5_VLForConditionalGeneration, folder / "text_encoder", dtype),
        "tokenizer": loading.load_tokenizer(Qwen2Tokenizer, folder / "tokenizer"),
    }
    if edits:
        parts["processor"] = loading.load(Qwen2VLProcessor, folder / "processor")
    # The pipeline without the parts that draw: it holds the prompt template and its handling.
    pipeline = getattr(diffusers, PIPELINES[edits])(scheduler=None, vae=None, transformer=None, **parts).to(device)

    def shown(picture: torch.Tensor):
        """Returns the picture as 8-bit RGB, at the size at which the pipeline shows it to the text encoder."""
        area, ratio = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE, picture.shape[2] / picture.shape[1]
        width, height = pipeline_qwenimage_edit_plus.calculate_dimensions(area, ratio)
        image = pipeline.image_processor.postprocess(picture[None].float(), output_type="pil")[0]
        return pipeline.image_processor.resize(image, height, width)

    @torch.no_grad()
    def encode(prompts: list[str], pictures: list[list[torch.Tensor]] | None = None) -> dict[str, torch.Tensor]:
        rows = []
        for index, prompt in enumerate(prompts):  # one by one, as the editing pipeline does: the counts may differ
            images = [shown(picture) for picture in pictures[index]] if edits and pictures is not None else []
            options = {"image": images or None} if edits else {}
            embeds, _ = pipeline.encode_prompt(
                prompt=[prompt], device=torch.device(device), max_sequence_length=max_sequence_length, **options
            )
            rows.append(embeds[0].cpu())
        lengths = torch.tensor([len(row) for row in rows])
        embeds = pad_sequence(rows, batch_first=True)
        return {"prompt_embeds": embeds, "prompt_mask": torch.arange(embeds.shape[1]) < lengths[:, None]}

    return encode


def prompt_readers(folder, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    tokenizer = loading.load_tokenizer(Qwen2Tokenizer, Path(folder) / "tokenizer")
    if "edit" in tasks(folder):  # the editing pipeline does not cut
        return [reader("tokenizer", tokenizer, None)]
    parts = dict.fromkeys(("scheduler", "vae", "transformer", "text_encoder"))
    pipeline = QwenImagePipeline(tokenizer=tokenizer, **parts)
    template, drop = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
    return [reader("tokenizer", tokenizer, length, template.format, drop)]


def picture_codec(folder, device="cpu", dtype: torch.dtype = torch.float32):
    """Loads the VAE.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w] that the transformer takes, and its inverse, in
        `dtype` on `device`, without gradient. encode gives the posterior's mode, normalised by latents_mean and
        latents_std.

    Raises:
        UserError: The folder lacks the VAE.
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
    """Returns the scheduler's noise levels [num_inference_steps + 1] float32 down to 0, shifted for this picture size.

    Raises:
        UserError: The scheduler has none: a shift_terminal, as Qwen-Image's own has, needs two steps.
    """
    _, h, w = latent_shape(folder, height, width)
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    ranges = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15)
    mu = pipeline_qwenimage.calculate_shift(h * w // 4, *(scheduler.config.get(*entry) for entry in ranges))
    least = 2 if scheduler.config.get("shift_terminal") else 1
    if num_inference_steps < least:
        raise UserError(f"the scheduler of {folder} has no noise levels for {num_inference_steps} step(s), use {least}")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), mu=mu)
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
        prompt: Rows of text_encoder's dict, without a mask where all are of one length.
        sources: Latents of the source pictures [B, C, h_i, w_i], in the order in which the text encoder saw them.
        guidance: Ignored: this transformer class has no such input that works.

    Returns:
        [B, C, h, w] in the latents' dtype.
    """
    pictures = (latents, *sources)
    dtype = loading.input_dtype(transformer)
    tokens = torch.cat([loading.pack(picture.to(dtype)) for picture in pictures], dim=1)
    shapes = [(1, picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]
    predicted = transformer(
        hidden_states=tokens,
        timestep=sigma,  # the transformer multiplies it by 1000 itself
        encoder_hidden_states=prompt["prompt_embeds"].to(dtype),
        encoder_hidden_states_mask=loading.mask_of(prompt, latents.device),
        img_shapes=[shapes] * len(latents),
        return_dict=False,
    )[0]
    height, width = latents.shape[2:]
    return loading.unpack(predicted[:, : height * width // 4], height, width).to(latents.dtype)


def combine(cond: torch.Tensor, uncond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Guides as these pipelines do: classifier-free, each token keeping the norm of its conditional velocity.

    Args:
        cond, uncond: Velocities [B, C, h, w].
        scale: A number or [B].

    Returns:
        [B, C, h, w].
    """
    height, width = cond.shape[2:]
    cond, uncond = loading.pack(cond), loading.pack(uncond)
    scale = torch.as_tensor(scale, dtype=cond.dtype, device=cond.device).view(-1, 1, 1)
    mixed = uncond + scale * (cond - uncond)
    return loading.unpack(mixed * (cond.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)), height, width)


def call_options(name: str, guidance_scale: float | None, size: tuple[int, int] | None) -> dict:
    """Returns the arguments of a pipeline's call, by its class's name, for a guidance and a size (None: its own)."""
    sizes = {} if size is None else {"height": size[0], "width": size[1]}
    scale = {} if guidance_scale is None else {"true_cfg_scale": guidance_scale}
    # Guidance needs a negative prompt, else there is none.
    negative = {"negative_prompt": " "} if guidance_scale is None or guidance_scale > 1 else {}
    return sizes | scale | negative
