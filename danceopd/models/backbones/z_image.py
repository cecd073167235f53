"""Serves Z-Image and Z-Image Omni, whose transformer takes lists of pictures and prompts of any length.

The pipelines' guidance_scale g is added to the conditional field, v + g (v - v_empty): alpha = 1 + g in
danceopd.core.fields.guided.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift, get_default_z_image_sigmas
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, Siglip2VisionModel

from danceopd.models import loading
from danceopd.models.prompts import Reader, chat_reader, reader
from danceopd.support.errors import UserError

PIPELINES = ("ZImagePipeline", "ZImageOmniPipeline")

BASE = "Z-Image"  # released, and not distilled to a few steps

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

UNGUIDED = 0.0  # the pipelines' guidance_scale that asks for the conditional field alone

PROMPTS_SEE_PICTURES = True  # where the folder edits

PROMPTS_HAVE_MASKS = True

MAX_SEQUENCE_LENGTH = 512  # tokens of a prompt, or of each part of one, template included: the pipelines' default

MAX_SOURCES = float("inf")  # where the folder edits


def tasks(folder: str | Path) -> tuple[str, ...]:
    """Returns what the pipeline does: only the omni one takes source pictures.

    A UserError if it is neither pipeline.
    """
    return ("t2i", "edit") if loading.class_name_of(folder, PIPELINES) == "ZImageOmniPipeline" else ("t2i",)


def distilled_scheduler(folder, scheduler: dict) -> str | None:
    """Says what shows Z-Image-Turbo, by its scheduler's values; None for others."""
    if scheduler.get("shift") == 3:
        return "its scheduler's shift of 3, as Z-Image-Turbo's; Z-Image has 6"


def load_transformer(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Loads the transformer in eval mode from the pipeline's folder or its own; a UserError if it is missing."""
    return loading.load_transformer(ZImageTransformer2DModel, folder, dtype)


# Long: a third of it says what it returns.
def text_encoder(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
):
    """Loads the text encoder once.

    Returns:
        encode(prompts, pictures=None) -> dict of tensors on the CPU, n rows each: prompt_embeds [n, L, C] in dtype,
        zeros after the prompt's end, and prompt_mask [n, L] bool. From the omni pipeline also prompt_parts [n, P]
        int64, the lengths of the parts that the pictures cut the prompt into (0: no part), and with pictures (per
        prompt a list of [3, H, W] in [-1, 1]) siglip_embeds [n, R, N, C] with siglip_shapes [n, R, 2] int64, the height
        and width in tokens (0: no picture). The negative prompt takes the same pictures.
    """
    folder, name = Path(folder), loading.class_name_of(folder, PIPELINES)
    omni = name == "ZImageOmniPipeline"
    components = {"tokenizer": loading.load(AutoTokenizer, folder / "tokenizer")}
    if omni:
        components["siglip_processor"] = loading.load(AutoImageProcessor, folder / "siglip_processor")
    elif not components["tokenizer"].chat_template:
        raise UserError(f"the tokenizer of {folder} has no chat template")
    for key, model in {"text_encoder": AutoModel, **({"siglip": Siglip2VisionModel} if omni else {})}.items():
        components[key] = loading.load_model(model, folder / key, dtype).to(device)
    # Without transformer and VAE the pipeline is but its prompt template.
    pipeline = getattr(diffusers, name)(scheduler=None, vae=None, transformer=None, **components)
    to_pil = VaeImageProcessor().postprocess

    def embed(prompt, count):
        """Returns the prompt's parts, each [length, C]."""
        options = {"max_sequence_length": max_sequence_length} | ({"num_condition_images": count} if omni else {})
        embeds = pipeline.encode_prompt(prompt, device, False, **options)[0]
        return embeds[0] if omni else embeds

    @torch.no_grad()
    def encode(prompts: list[str], pictures: list[list[torch.Tensor]] | None = None) -> dict[str, torch.Tensor]:
        if pictures is None or not omni:
            pictures = [[]] * len(prompts)
        # One by one: the pipeline pads each part to all tokens and keeps the hidden states of every layer.
        prompt_parts = [embed(prompt, len(own)) for prompt, own in zip(prompts, pictures, strict=True)]
        embeds = pad_sequence([torch.cat(parts).cpu() for parts in prompt_parts], batch_first=True)
        lengths = pad_sequence([torch.tensor([len(p) for p in parts]) for parts in prompt_parts], batch_first=True)
        mask = torch.arange(embeds.shape[1]) < lengths.sum(1, keepdim=True)
        rows = {"prompt_embeds": embeds, "prompt_mask": mask}
        if omni:
            rows["prompt_parts"] = lengths
        if any(pictures):
            most, tokens = max(map(len, pictures)), pipeline.siglip_processor.max_num_patches
            seen = torch.zeros(len(prompts), most, tokens, pipeline.siglip.config.hidden_size, dtype=dtype)
            shapes = torch.zeros(len(prompts), most, 2, dtype=torch.int64)
            for i, own in enumerate(pictures):
                images = [to_pil(picture[None].float(), output_type="pil")[0] for picture in own]
                for j, features in enumerate(pipeline.prepare_siglip_embeds(images, 1, device, dtype)[0]):
                    shapes[i, j] = torch.tensor(features.shape[:2])
                    seen[i, j, : features.shape[0] * features.shape[1]] = features.flatten(0, 1)
            rows |= {"siglip_embeds": seen, "siglip_shapes": shapes}
        return rows

    return encode


def prompt_readers(folder: str | Path, length: int) -> list[Reader]:
    """Loads the tokenizers as text_encoder uses them at this max_sequence_length, for what they change of prompts."""
    tokenizer = loading.load(AutoTokenizer, Path(folder) / "tokenizer")
    if "edit" not in tasks(folder):
        return [chat_reader(tokenizer, length, enable_thinking=True)]
    # The longest of the parts that pictures cut a prompt into has the prompt itself.
    around = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>".format
    return [reader("tokenizer", tokenizer, length, around)]


def picture_codec(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """Loads the VAE.

    Returns:
        encode(pictures [n, 3, H, W] in [-1, 1]) -> latents [n, C, H / 8, W / 8], scaled and shifted, and its inverse,
        in dtype on the device, without gradient.
    """
    return loading.picture_codec(folder, device, dtype)


@loading.names_folder
def latent_shape(folder: str | Path, height: int, width: int) -> tuple[int, int, int]:
    """Returns (C, h, w) of the latents of one picture; a UserError unless both sizes are multiples of the patch's."""
    config = loading.read_json(Path(folder) / "vae" / "config.json")
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if height < 1 or width < 1 or height % (2 * factor) or width % (2 * factor):
        raise UserError(f"height and width must be multiples of {2 * factor}, got {height} x {width}")
    return config["latent_channels"], height // factor, width // factor


@loading.names_folder
def sigmas(folder: str | Path, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
    """Returns the pipeline's noise levels for this picture size: [N + 1] float32, down to 0."""
    scheduler = loading.load(FlowMatchEulerDiscreteScheduler, Path(folder) / "scheduler")
    _, h, w = latent_shape(folder, height, width)
    config = scheduler.config
    sizes = config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    mu = calculate_shift((h // 2) * (w // 2), *sizes)
    scheduler.set_timesteps(sigmas=get_default_z_image_sigmas(num_inference_steps), mu=mu)
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
        transformer: Of this family.
        latents: [B, C, h, w].
        sigma: [B].
        prompt: Rows of text_encoder; its masks, lengths and shapes may stay on the CPU, which saves a wait for the GPU.
            Without a prompt_mask all prompts have the length that they have. With a prompt_keep all must be as long
            once
            the transformer has filled them up to its multiple of 32 tokens, which is done here: nothing is read on the
            host then.
        sources: Clean latents of the source pictures, each [B, C, h_i, w_i].
        guidance: Ignored.

    Returns:
        [B, C, h, w] in the latents' dtype.

    Raises:
        ValueError: The prompt was not encoded with as many pictures as there are sources.
    """
    dtype = loading.input_dtype(transformer)
    embeds = prompt["prompt_embeds"].to(dtype)
    images = list(latents.to(dtype).unsqueeze(2))
    # The transformer's time runs from noise at 0. Rounded as in the pipeline: 1 - sigma differs in the last bit, and
    # the time's embedding multiplies that by 1000.
    time = (1000 - 1000 * sigma.float()) / 1000
    if "prompt_parts" in prompt:
        lengths = [[n for n in row if n] for row in prompt["prompt_parts"].tolist()]
        features = _siglip_features(prompt, dtype) if sources else [[]] * len(latents)
        # A prompt has a part before, between and after its pictures, and one more for the picture to be made.
        parts, count = (len(sources) + 2 if sources else 1), len(sources)
        if any(len(row) != parts for row in lengths) or any(len(row) != count for row in features):
            raise ValueError(f"the prompts (the negative ones too) must be encoded with their {count} source pictures")
        texts = [list(row[: sum(n)].split(n)) for row, n in zip(embeds, lengths, strict=True)]
        clean = [list(source.to(dtype).unsqueeze(2)) for source in sources]
        images = [[source[i] for source in clean] + [image] for i, image in enumerate(images)]
        options = {
            "siglip_feats": [[*row, None] if row else None for row in features],
            "image_noise_mask": [[0] * count + [1]] * len(images),
        }
    elif sources:
        raise ValueError("only the omni pipeline takes source pictures")
    elif "prompt_mask" in prompt:
        lengths = prompt["prompt_mask"].sum(1).tolist()
        texts, options = [row[:n] for row, n in zip(embeds, lengths, strict=True)], {}
    else:
        texts, options = list(embeds), {}
    with _own_padding(transformer, prompt.get("prompt_keep")):
        output = transformer(images, time, texts, return_dict=False, **options)[0]
    return -torch.stack(output).squeeze(2).to(latents.dtype)


@contextmanager
def _own_padding(transformer: nn.Module, keep: torch.Tensor | None) -> Iterator[None]:
    """Makes the transformer see its own padding token wherever keep [B, L] is False, inside the block.

    It would put it there itself, after so many tokens of each prompt as its list says: numbers on the host.
    """
    if keep is None:
        yield
        return
    if keep.shape[1] % SEQ_MULTI_OF:
        raise ValueError(f"prompts are to keep a multiple of {SEQ_MULTI_OF} tokens, got {keep.shape[1]}")

    def replace(_, __, embedded):
        return torch.where(keep.flatten()[:, None], embedded, transformer.cap_pad_token.to(embedded.dtype))

    hook = transformer.cap_embedder.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _siglip_features(prompt, dtype):
    """Returns, per sample, the list of its pictures' features [h, w, C]."""
    if "siglip_embeds" not in prompt:
        return [[]] * len(prompt["prompt_embeds"])
    embeds, shapes = prompt["siglip_embeds"].to(dtype), prompt["siglip_shapes"].tolist()
    return [
        [picture[: h * w].unflatten(0, (h, w)) for picture, (h, w) in zip(row, sizes, strict=True) if h]
        for row, sizes in zip(embeds, shapes, strict=True)
    ]
