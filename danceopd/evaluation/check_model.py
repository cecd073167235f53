"""Compares a family's field with its diffusers pipeline, stage by stage: `danceopd check-model`.

Both draw the same picture from the same noise, and what each of them gives its transformer and gets from it is kept.
"""

import gc
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import ClassifierFreeGuidance, DiffusionPipeline, ModularPipeline
from PIL import Image

from danceopd.evaluation.pipelines import call_options, takes
from danceopd.models import loading
from danceopd.models.backbones import backbone_of, combine_of
from danceopd.support.errors import UserError

PROMPT = 'a red cat left of two blue dogs, over them the word "CATS"'

SEED = 1

EMBEDDED = 3.5  # the guidance that a distilled model is given as an input

# What the arguments of a transformer's forward are called here; others go by their own names.
STAGES = {
    "encoder_hidden_states": "encoded prompt",
    "pooled_projections": "pooled prompt",
    "timestep": "noise level",
    "hidden_states": "latents and source pictures",
}


@dataclass(frozen=True)
class Stage:
    """One thing that field and pipeline have both computed.

    Attributes:
        name: What, and at which step.
        difference: The largest, over the largest number of the pipeline's; None where the shapes differ.
        shapes: Ours and theirs.
    """

    name: str
    difference: float | None
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class Run:
    """What a picture was made by.

    Attributes:
        calls: The tensors that each forward of the transformer was given, by argument, and its "velocity".
        picture: [3, H, W] in [-1, 1].
    """

    calls: list[dict[str, torch.Tensor]] = field(default_factory=list)
    picture: torch.Tensor | None = None


@dataclass(frozen=True)
class How:
    """How the picture is drawn.

    Attributes:
        task: "t2i" or "edit".
        size: (height, width) in pixels.
        steps: Number of steps.
        guidance: The factor of classifier-free guidance, or the input of a model that takes one; 1 for none.
        references: Number of source pictures of an edit.
        device, dtype: Of the networks.
    """

    task: str
    size: tuple[int, int] = (1024, 1024)
    steps: int = 2
    guidance: float = 1.0
    references: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def check_model(folder: Path, how: How, tolerance: float = 1e-4) -> tuple[list[Stage], Stage | None]:
    """Draws a picture by the pipeline of a folder and by the family's functions, and compares all stages.

    Args:
        folder: The pipeline's.
        how: How the picture is drawn.
        tolerance: The largest difference that passes.

    Returns:
        The stages in their order, and the first whose difference is larger; None where there is none. An argument of
        another shape (where the field leaves padding out) is not compared, but a velocity or a picture must have the
        same.

    Raises:
        UserError: The folder is no pipeline of a family, lacks a part, or does not do the task.
    """
    backbone = backbone_of(folder)
    if how.task not in tasks_of(folder):
        raise UserError(f"a {loading.class_name_of(folder)} does not do {how.task}")
    backbone.latent_shape(folder, *how.size)
    pictures = [_photo(how.size, seed) for seed in range(how.references)] if how.task == "edit" else []
    theirs = _by_pipeline(folder, backbone, how, pictures)
    gc.collect()
    ours = _by_field(folder, backbone, how, pictures)
    stages = list(_compare(ours, theirs, how))
    return stages, next((stage for stage in stages if _differs(stage, tolerance)), None)


def tasks_of(folder: Path) -> tuple[str, ...]:
    """Returns what the pipeline of a folder does; its field may do more. A UserError as from backbone_of."""
    backbone = backbone_of(folder)
    edit_only = loading.class_name_of(folder) in getattr(backbone, "EDIT_ONLY", ())
    return tuple(task for task in backbone.tasks(folder) if task == "edit" or not edit_only)


def _embedded(how: How) -> float:
    """Returns the guidance that a model is given which takes it as an input, and has no other."""
    return EMBEDDED if how.guidance == 1 else how.guidance


def _differs(stage: Stage, tolerance: float) -> bool:
    if stage.difference is None:
        return stage.name.startswith(("velocity", "picture"))
    return not stage.difference <= tolerance  # NaN differs


def _photo(size: tuple[int, int], seed: int) -> Image.Image:
    """Makes a smooth picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)


def _watch(transformer: torch.nn.Module, run: Run) -> None:
    """Keeps what a transformer is given and gives from now on."""

    def keep(module, args, kwargs, output):
        named = kwargs | dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args, strict=False))
        call = {name: _tensor(value) for name, value in named.items()}
        call["velocity"] = _tensor(output[0] if isinstance(output, tuple) else output)
        run.calls.append({name: value for name, value in call.items() if value is not None})

    transformer.register_forward_hook(keep, with_kwargs=True)


def _tensor(value: object) -> torch.Tensor | None:
    """Takes a copy of a tensor, or of the only one in lists; None of anything else."""
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    return value.detach().float().cpu().clone() if isinstance(value, torch.Tensor) else None


def _by_pipeline(folder: Path, backbone, how: How, pictures: list[Image.Image]) -> Run:
    """Draws as diffusers does."""
    modular = not (folder / "model_index.json").is_file()
    if modular:
        blocks = loading.load(ModularPipeline, folder).blocks
        blocks.sub_blocks.pop("prompt_upsampler", None)  # which has another model write the prompt anew
        pipeline = blocks.init_pipeline(str(folder))
        pipeline.load_components(pretrained_model_name_or_path=str(folder), dtype=how.dtype)
        pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=how.guidance))
        pipeline.to(how.device)
    else:
        pipeline = loading.load(DiffusionPipeline, folder, dtype=how.dtype, use_safetensors=True).to(how.device)
        pipeline.set_progress_bar_config(disable=True)
    run, network = Run(), getattr(pipeline, loading.transformer_folder(folder).name)
    _watch(network, run)
    scale = how.guidance - 1 + getattr(backbone, "UNGUIDED", 1.0)
    if getattr(network.config, "guidance_embeds", False):
        scale = _embedded(how)
    if modular:  # its guidance is a part of it
        options = {"height": how.size[0], "width": how.size[1], "num_inference_steps": how.steps, "output": "images"}
    else:
        options = call_options(pipeline, scale, how.size, how.steps, None) | {"return_dict": False}
    if not modular and how.guidance != 1 and takes(pipeline, "negative_prompt"):
        options["negative_prompt"] = ""
    if pictures:
        options["image"] = pictures if len(pictures) > 1 else pictures[0]
    drawn = pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(SEED), output_type="pt", **options)
    drawn = drawn if modular else drawn[0]
    run.picture = 2 * drawn[0, :3].float().cpu() - 1  # without how opaque it is
    return run


@torch.no_grad()
def _by_field(folder: Path, backbone, how: How, pictures: list[Image.Image]) -> Run:
    """Draws by the functions that training asks."""
    run, place = Run(), {"device": how.device, "dtype": how.dtype}
    tensors = [torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1 for p in pictures]
    encode = backbone.text_encoder(folder, **place)
    prompts = [_on(encode([text], [tensors] if tensors else None), how.device) for text in (PROMPT, "")]
    del encode
    gc.collect()
    encode_picture, decode = backbone.picture_codec(folder, **place)
    sources = tuple(encode_picture(tensor[None]) for tensor in tensors)
    transformer = backbone.load_transformer(folder, how.dtype).to(how.device)
    _watch(transformer, run)
    embedded = _embedded(how) if getattr(transformer.config, "guidance_embeds", False) else None
    combine = combine_of(folder) or (lambda cond, uncond, scale: uncond + scale * (cond - uncond))

    def velocity(latents, sigma) -> torch.Tensor:
        """Asks with guidance where the picture is drawn with it; the first prompt's call comes first."""
        asked = prompts if how.guidance != 1 and embedded is None else prompts[:1]
        answers = [backbone.velocity(transformer, latents, sigma, p, sources, embedded) for p in asked]
        return combine(*answers, how.guidance) if len(answers) > 1 else answers[0]

    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(1, *backbone.latent_shape(folder, *how.size), generator=generator, dtype=how.dtype)
    latents = latents.to(how.device)
    for high, low in pairwise(backbone.sigmas(folder, how.steps, *how.size).tolist()):
        step = velocity(latents, torch.full((1,), high, device=how.device))
        latents = (latents.float() + (low - high) * step.float()).to(how.dtype)
    run.picture = decode(latents)[0].float().clamp(-1, 1).cpu()
    return run


def _on(prompt: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Takes one prompt to a device, without a mask that hides nothing."""
    if "prompt_mask" in prompt and prompt["prompt_mask"].all():
        prompt = {name: value for name, value in prompt.items() if name != "prompt_mask"}
    return {name: value.to(device) for name, value in prompt.items()}


def _compare(ours: Run, theirs: Run, how: How):
    """Yields the stages in the order in which a picture is made."""
    if how.guidance == 1:  # with it some pipelines ask for both prompts at once
        if len(ours.calls) != len(theirs.calls):
            counts = ((len(ours.calls),), (len(theirs.calls),))
            yield Stage("velocity: number of forwards", None, counts)
        for step, (own, other) in enumerate(zip(ours.calls, theirs.calls, strict=False), 1):
            names = [name for name in (*STAGES, *sorted(own.keys() - STAGES.keys() - {"velocity"})) if name in other]
            for name in (*(name for name in names if name in own), "velocity"):
                blank = torch.empty(0)  # of a transformer that was asked for several samples at once
                yield _stage(f"{STAGES.get(name, name)} of step {step}", own.get(name, blank), other.get(name, blank))
    yield _stage("picture", ours.picture, theirs.picture)


def _stage(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Stage:
    shapes = tuple(ours.shape), tuple(theirs.shape)
    if name.startswith("velocity") and ours.dim() == theirs.dim() == 3:
        # A pipeline that keeps what it computed of prompt and source pictures asks for the picture's tokens alone.
        ours, theirs = (value[:, -min(ours.shape[1], theirs.shape[1]) :] for value in (ours, theirs))
    if theirs.dim() and ours.dim() == theirs.dim() and ours.shape[1:] == theirs.shape[1:]:
        theirs = theirs[-len(ours) :]  # of a pipeline that asks for the empty prompt too, the other comes last
    if ours.numel() == theirs.numel():  # one of them may have a batch of 1
        theirs = theirs.view_as(ours)
    else:
        return Stage(name, None, shapes)
    largest = theirs.abs().max().clamp(min=1e-30)
    return Stage(name, ((ours - theirs).abs().max() / largest).item(), shapes)


def table(stages: list[Stage]) -> list[str]:
    """Writes the stages as lines, each with its difference."""

    def said(stage: Stage) -> str:
        if stage.difference is not None:
            return f"{stage.difference:.1e}"
        return f"not compared: ours is {list(stage.shapes[0])}, the pipeline's {list(stage.shapes[1])}"

    width = max(len(stage.name) for stage in stages)
    return [f"{stage.name:{width}s}  {said(stage)}" for stage in stages]
