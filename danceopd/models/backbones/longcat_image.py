"""Serves LongCat-Image and LongCat-Image-Edit by diffusers' classes; latents are [B, C, h, w].

Both hold the same classes. The editing model's text encoder also looks at the picture, and its transformer sees that
picture's latents after those of the picture it draws. Prompts for it without a picture are in LongCat-Image's template.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.longcat_image import pipeline_longcat_image as of_drawing
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as of_editing
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor

from danceopd.models import loading
from danceopd.models.prompts import Reader, special_tokens

PIPELINES = ("LongCatImagePipeline", "LongCatImageEditPipeline")

BASE = "LongCat-Image or LongCat-Image-Edit"  # released, and not distilled to a few steps

EDIT_ONLY = ("LongCatImageEditPipeline",)  # pipelines that do not draw without a picture

# Of both kinds of blocks; a single block's output projection is one with its MLP's, and stays as it is.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

PROMPTS_SEE_PICTURES = True  # where the folder edits
PROMPTS_HAVE_MASKS = False  # the padding is attended to

COMBINE_PIPELINES = ("LongCatImagePipeline",)  # whose guidance combine is; the editing one's is the usual one

MAX_SOURCES = 1  # where the folder edits

MAX_SEQUENCE_LENGTH = 512  # tokens of a prompt, padding included, without template and picture: both pipelines'

SHOWN_AREA = 1024 * 1024 // 4  # pixels at which the editing pipeline shows a picture to the text encoder


def tasks(folder) -> tuple[str, ...]:
    """Returns ("t2i",) for LongCat-Image, ("t2i", "edit") for the editing one. Raises UserError for another folder."""
    return ("t2i", "edit") if loading.class_name_of(folder, PIPELINES) == "LongCatImageEditPipeline" else ("t2i",)


def load_transformer(folder, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Loads the transformer of a pipeline folder, or of its own, in eval mode; a UserError where it is not whole."""
    return loading.load_transformer(LongCatImageTransformer2DModel, folder, dtype)


def text_encoder(
    folder, device="cpu", dtype: torch.dtype = torch.float32, max_sequence_length: int = MAX_SEQUENCE_LENGTH
):
    """Loads the text encoder once. The pipelines can have it rewrite prompts first, which is left out here.

    Returns:
        encode(prompts, pictures=None) -> {"prompt_embeds": [n, L, C]} in dtype on the CPU, L the max_sequence_length.
        From an editing folder, which looks at a picture [3, H, W] in [-1, 1] of each prompt that has one, its tokens
        come first: then also "prompt_mask" [n, L] bool, False after a row's end, and "prompt_parts" [n, 2] int64, the
        tokens of its picture (0: none) and of its prompt.

    Raises:
        UserError: The folder is not one of PIPELINES or lacks a part.
    """
    folder, edits = Path(folder), "edit" in tasks(folder)
    parts = {
        "text_encoder": loading.load_model(Qwen2_5_VLForConditionalGeneration, folder / "text_encoder", dtype),
        "tokenizer": loading.load_tokenizer(Qwen2Tokenizer, folder / "tokenizer"),
        "text_processor": loading.load(Qwen2VLProcessor, folder / "text_processor"),
    }
    # The pipelines without the parts that draw: they hold the prompt templates and their handling.
    pipelines = (LongCatImagePipeline, LongCatImageEditPipeline)[: 1 + edits]
    draw, *edit = (cls(scheduler=None, vae=None, transformer=None, **parts).to(device) for cls in pipelines)
    for pipeline in (draw, *edit):
        pipeline.tokenizer_max_length = max_sequence_length
    processor = VaeImageProcessor()

    def shown(picture: torch.Tensor):
        """Returns the picture as 8-bit RGB, as large as the pipeline shows it to the text encoder."""
        width, height = of_editing.calculate_dimensions(4 * SHOWN_AREA, picture.shape[2] / picture.shape[1])
        image = processor.postprocess(picture[None].float(), output_type="pil")[0]
        return processor.resize(processor.resize(image, height, width), height // 2, width // 2)

    @torch.no_grad()
    def encode(prompts: list[str], pictures: list[list[torch.Tensor]] | None = None) -> dict[str, torch.Tensor]:
        rows, seen = [], [[]] * len(prompts) if pictures is None or not edits else pictures
        for prompt, own in zip(prompts, seen, strict=True):
            embeds = edit[0]._encode_prompt([prompt], shown(own[0])) if own else draw._encode_prompt([prompt])
            rows.append(embeds[0].cpu())
        if not edits:
            return {"prompt_embeds": torch.stack(rows)}
        embeds, lengths = pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
        parts = torch.stack([lengths - max_sequence_length, torch.full_like(lengths, max_sequence_length)], dim=1)
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
        return {"prompt_embeds": embeds, "prompt_mask": mask, "prompt_parts": parts}

    return encode


def prompt_readers(folder, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    tokenizer = loading.load_tokenizer(Qwen2Tokenizer, Path(folder) / "tokenizer")

    def pieces(prompt: str) -> list[str]:
        """Splits a prompt as the pipelines do: quoted text letter by letter."""
        return [piece for part, quoted in of_drawing.split_quotation(prompt) for piece in (part if quoted else [part])]

    def lengths(prompts: list[str]) -> list[int]:
        return [sum(len(ids) for ids in tokenizer(found)["input_ids"]) if (found := pieces(p)) else 0 for p in prompts]

    return [Reader("tokenizer", length, lengths, special_tokens(tokenizer))]


def picture_codec(folder, device="cpu", dtype: torch.dtype = torch.float32):
    """Loads the VAE: encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w], and its inverse."""
    return loading.picture_codec(folder, device, dtype)


@loading.names_folder
def latent_shape(folder, height: int, width: int) -> tuple[int, ...]:
    """Returns (C, h, w) of one sample's noise. Raises UserError if a side is no multiple of 16 (8 VAE, 2 packing)."""
    return loading.latent_shape(folder, height, width, patch=2)


@loading.names_folder
def sigmas(folder, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns [N + 1] float32 from 1 to 0: the pipelines' noise levels for this picture size."""
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    _, h, w = latent_shape(folder, height, width)
    ranges = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15)
    mu = of_drawing.calculate_shift(h * w // 4, *(scheduler.config.get(*entry) for entry in ranges))
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
        prompt: Rows of text_encoder, all of one length.
        sources: Latents of the source picture, [B, C, h', w'], or none.
        guidance: Ignored.

    Returns:
        [B, C, h, w] in the latents' dtype.
    """
    dtype, embeds = loading.input_dtype(transformer), prompt["prompt_embeds"]
    with torch.device(latents.device):  # built there, such that nothing is copied and waited for
        text_ids = of_drawing.prepare_pos_ids(num_token=embeds.shape[1])
        picture_ids = _positions(embeds.shape[1], (latents, *sources))
    pictures = [loading.pack(picture.to(dtype)) for picture in (latents, *sources)]
    output = transformer(
        hidden_states=torch.cat(pictures, dim=1),
        timestep=(1000 * sigma).to(dtype) / 1000,  # rounded as in the pipelines
        encoder_hidden_states=embeds.to(dtype),
        txt_ids=text_ids,
        img_ids=picture_ids,
        return_dict=False,
    )[0]
    return loading.unpack(output[:, : pictures[0].shape[1]], *latents.shape[2:]).to(latents.dtype)


def _positions(text: int, pictures: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns [tokens, 3] float32: (kind, row, column) of pictures' tokens, whose grids begin where the text ends."""
    sizes = [(picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]
    return torch.cat([of_drawing.prepare_pos_ids(k, "image", (text, text), None, *s) for k, s in enumerate(sizes, 1)])


def combine(cond: torch.Tensor, uncond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Guides as LongCat-Image's pipeline does: no token's velocity gets longer than its conditional one."""
    height, width = cond.shape[2:]
    cond, uncond = loading.pack(cond), loading.pack(uncond)
    mixed = uncond + torch.as_tensor(scale, dtype=cond.dtype, device=cond.device).view(-1, 1, 1) * (cond - uncond)
    shrink = (cond.norm(dim=-1, keepdim=True) / (mixed.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1)
    return loading.unpack(mixed * shrink, height, width)


def call_options(name: str, guidance_scale: float | None, size: tuple[int, int] | None) -> dict:
    """Returns the arguments of a pipeline's call, by its class's name, for a guidance and a size (None: its own)."""
    options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if name == "LongCatImageEditPipeline":  # which takes its size from the picture
        return options
    sizes = {} if size is None else {"height": size[0], "width": size[1]}
    return options | sizes | {"enable_prompt_rewrite": False}
