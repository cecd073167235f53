"""Serves PRX, in a VAE's latents [B, C, h, w]; its transformer takes them as they are.

Diffusers gives this transformer no adapters: a student's LoRA draws once it is merged (danceopd export --merge).
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    PRXPipeline,
    PRXTransformer2DModel,
)
from diffusers.pipelines.prx import T5GemmaEncoder
from diffusers.utils import is_ftfy_available
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from danceopd.models import loading
from danceopd.models.prompts import Reader, reader
from danceopd.support.errors import UserError

PIPELINES = ("PRXPipeline",)

BASE = "prx-512-t2i-sft"  # released, and not distilled to a few steps

LORA_TARGETS = ("img_qkv_proj", "txt_kv_proj", "to_out.0")  # q, k and v are one layer

PROMPTS_SEE_PICTURES = False

PROMPTS_HAVE_MASKS = True

MAX_SEQUENCE_LENGTH = 256  # tokens of a prompt: of the released tokenizers

LENGTH_ARGUMENT = "tokenizer_max_length"  # the pipeline's name of it

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
    return loading.load_transformer(PRXTransformer2DModel, folder, dtype)


def _prompts(**parts) -> PRXPipeline:
    """Makes the pipeline without the parts that draw: it cleans prompts and reads them."""
    if not is_ftfy_available():
        raise UserError("PRX cleans its prompts with ftfy: pip install 'danceopd[prx]'")
    return PRXPipeline(**dict.fromkeys(("scheduler", "vae", "transformer", "text_encoder")) | parts)


def text_encoder(
    folder, device="cpu", dtype: torch.dtype = torch.float32, max_sequence_length: int = MAX_SEQUENCE_LENGTH
):
    """Loads the text encoder once.

    Returns:
        encode(prompts, pictures=None) -> {"prompt_embeds": [n, L, C] in dtype, "prompt_mask": [n, L] bool}, on the CPU,
        rows without the pipeline's padding and filled up at the end with zeros. The pictures are not looked at.

    Raises:
        UserError: A part is missing, or ftfy is not installed.
    """
    folder = Path(folder)
    model = loading.load_model(T5GemmaEncoder, folder / "text_encoder", dtype).to(device)
    pipeline = _prompts(tokenizer=loading.load(AutoTokenizer, folder / "tokenizer"), text_encoder=model)

    @torch.no_grad()
    def encode(prompts: list[str], pictures=None) -> dict[str, torch.Tensor]:
        rows, options = [], {"tokenizer_max_length": max_sequence_length}
        for prompt in prompts:
            embeds, mask, *_ = pipeline.encode_prompt(prompt, torch.device(device), False, **options)
            rows.append(embeds[0][mask[0]].cpu())
        lengths = torch.tensor([len(row) for row in rows])
        embeds = pad_sequence(rows, batch_first=True)
        return {"prompt_embeds": embeds, "prompt_mask": torch.arange(embeds.shape[1]) < lengths[:, None]}

    return encode


def prompt_readers(folder, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    tokenizer = loading.load(AutoTokenizer, Path(folder) / "tokenizer")
    return [reader("tokenizer", tokenizer, length, _prompts(tokenizer=tokenizer).text_preprocessor.clean_text)]


def picture_codec(folder, device="cpu", dtype: torch.dtype = torch.float32):
    """Loads the VAE, FLUX's or a deep-compression one.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, h, w] and its inverse, in `dtype` on `device`,
        without gradient.

    Raises:
        UserError: The VAE is missing.
    """
    if _vae(folder).get("_class_name") != "AutoencoderDC":
        return loading.picture_codec(folder, device, dtype)
    vae = loading.load_model(AutoencoderDC, Path(folder) / "vae", dtype).to(device)

    @torch.no_grad()
    def encode(pictures: torch.Tensor) -> torch.Tensor:
        return vae.encode(pictures.to(device, dtype)).latent * vae.config.scaling_factor

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return vae.decode(latents.to(device, dtype) / vae.config.scaling_factor).sample.clamp(-1, 1)

    return encode, decode


def _vae(folder) -> dict:
    """Reads the VAE's configuration."""
    return loading.read_json(Path(folder) / "vae" / "config.json")


@loading.names_folder
def latent_shape(folder, height: int, width: int) -> tuple[int, ...]:
    """Returns (C, h, w) of one sample's noise. Raises UserError if a side is no multiple of the transformer's patch."""
    config = _vae(folder)
    blocks = config.get("encoder_block_out_channels") or config["block_out_channels"]
    scale = 2 ** (len(blocks) - 1)
    patch = loading.read_json(Path(folder) / "transformer" / "config.json")["patch_size"]
    loading.check_size(height, width, patch * scale)
    return config["latent_channels"], height // scale, width // scale


@loading.names_folder
def sigmas(folder, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns the scheduler's noise levels [N + 1] float32 from 1 to 0, the same for every picture size."""
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    scheduler.set_timesteps(num_inference_steps)
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
    dtype = loading.input_dtype(transformer)
    return transformer(
        hidden_states=latents.to(dtype),
        timestep=1000 * sigma / 1000,  # rounded as in the pipeline
        encoder_hidden_states=prompt["prompt_embeds"].to(dtype),
        attention_mask=loading.mask_of(prompt, latents.device),
        return_dict=False,
    )[0].to(latents.dtype)


def call_options(name: str, guidance_scale: float | None, size: tuple[int, int] | None) -> dict:
    """Returns the arguments of a pipeline's call, by its class's name, for a guidance and a size (None: its own)."""
    options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    if size is None:
        return options
    return options | {"height": size[0], "width": size[1], "use_resolution_binning": False}  # else of a size nearby
