"""Serves FLUX.3 by diffusers' modular classes: one model for text-to-image and for editing with source pictures.

Its folders have a modular_model_index.json. Latents are FLUX.2's. Prompts are filled up to a multiple of 80 tokens, all
attended to, so that prompts of other lengths are forwards of their own. The step-distilled variant is not served: it is
a flow map, which takes the noise level that a step ends at too.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel
from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep, _prepare_image_ids
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from danceopd.models import loading
from danceopd.models.backbones import flux2
from danceopd.models.packing import each_length, in_whole_batches
from danceopd.models.prompts import Reader, chat_reader

PIPELINES = ("Flux3ModularPipeline",)

BASE = "FLUX.3's base weights"  # not distilled to a few steps

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of the blocks of each kind of token, and of the joint ones

PROMPTS_SEE_PICTURES = False

PROMPTS_HAVE_MASKS = False

MAX_SEQUENCE_LENGTH = 8192  # tokens of a prompt, template and padding included: the pipeline's default

MAX_SOURCES = float("inf")

SHIFT = 6.93  # of the noise levels, where the folder has no scheduler: the pipeline's own

ROPE_SCALE = 0.5  # of a picture's rows and columns, as its blocks number them


def tasks(folder) -> tuple[str, ...]:
    """Returns ("t2i", "edit"), of every model of the family. Raises UserError if the folder is of another pipeline."""
    loading.class_name_of(folder, PIPELINES)
    return ("t2i", "edit")


def load_transformer(folder, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Loads the transformer of a pipeline folder, or of a transformer folder itself, in eval mode.

    Raises:
        UserError: It is not there, is another class, or lacks weights.
    """
    return loading.load_transformer(Flux3Transformer2DModel, folder, dtype)


def text_encoder(
    folder, device="cpu", dtype: torch.dtype = torch.float32, max_sequence_length: int = MAX_SEQUENCE_LENGTH
):
    """Loads the text encoder once.

    Returns:
        encode(prompts, pictures=None) -> on the CPU "prompt_embeds" [n, L, C] in dtype, C the width of eight layers,
        "prompt_mask" [n, L] bool, False after a row's end (the pipeline's padding is part of it), and "prompt_parts"
        [n, 1] int64, its length. The pictures are not looked at.

    Raises:
        UserError: A part is missing.
    """
    folder = Path(folder)
    processor = loading.load(Qwen3VLProcessor, folder / "tokenizer")
    model = loading.load_model(Qwen3VLForConditionalGeneration, folder / "text_encoder", dtype).to(device)

    @torch.no_grad()
    def encode(prompts: list[str], pictures=None) -> dict[str, torch.Tensor]:
        embed, options = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds, {"max_sequence_length": max_sequence_length}
        rows = [embed(model, processor, prompt, **options)[0].cpu() for prompt in prompts]
        lengths, embeds = torch.tensor([len(row) for row in rows]), pad_sequence(rows, batch_first=True)
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
        return {"prompt_embeds": embeds, "prompt_mask": mask, "prompt_parts": lengths[:, None]}

    return encode


def prompt_readers(folder, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    processor = loading.load(Qwen3VLProcessor, Path(folder) / "tokenizer")
    processor.tokenizer.chat_template = processor.chat_template
    return [chat_reader(processor.tokenizer, length)]


picture_codec, latent_shape = flux2.picture_codec, flux2.latent_shape


@loading.names_folder
def sigmas(folder, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns the pipeline's noise levels [N + 1] float32 from 1 to 0, the same for every picture size."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    if (Path(folder) / "scheduler").is_dir():
        scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps))
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
        prompt: Rows of text_encoder, without a mask where all are of one length; others are a forward for each length.
        sources: Latents of the source pictures, each [B, C, h_i, w_i].
        guidance: Ignored.

    Returns:
        [B, C, h, w] in the latents' dtype.

    Raises:
        ValueError: Lengths differ where ranks that share a network must make equally many forwards.
    """
    if "prompt_mask" in prompt and in_whole_batches():
        raise ValueError("ranks share the network: prepare prompts of one length, by --max-sequence-length 80")

    def ask(latents, sigma, prompt, sources):
        dtype, embeds = loading.input_dtype(transformer), prompt["prompt_embeds"]
        tokens = [picture.to(dtype).flatten(2).transpose(1, 2) for picture in (latents, *sources)]
        with torch.device(latents.device):  # built there, such that nothing is copied and waited for
            text_ids = Flux3TextRoPEInputsStep._prepare_text_ids(embeds)
            ids = [_prepare_image_ids(*p.shape[2:], ROPE_SCALE, -i) for i, p in enumerate((latents, *sources))]
        seen = {}
        if sources:
            seen = {"image_cond_hidden_states": torch.cat(tokens[1:], 1), "image_cond_ids": torch.cat(ids[1:])}
        output = transformer(
            hidden_states=tokens[0],
            encoder_hidden_states=embeds.to(dtype),
            timestep=(1000 * sigma / 1000).to(dtype),  # rounded as in the pipeline
            img_ids=ids[0],
            txt_ids=text_ids,
            return_dict=False,
            **seen,
        )[0]
        return output.transpose(1, 2).unflatten(2, latents.shape[2:]).to(latents.dtype)

    return each_length(ask, latents, sigma, prompt, sources)
