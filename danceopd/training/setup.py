"""Everything a run needs, found and loaded before the first step; what is missing is listed at once."""

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_map

from danceopd.backbones.dit import DiT
from danceopd.checkpoint import load_model, resolve_weights, save_model
from danceopd.conditioning import Tensors
from danceopd.config import Config
from danceopd.data.manifest import ManifestData
from danceopd.data.sampler import Samples, embedded_samples
from danceopd.data.world import WorldData
from danceopd.eight_bit import check_eight_bit
from danceopd.errors import UserError
from danceopd.fields import Field, guided
from danceopd.fp8 import check_fp8, to_fp8
from danceopd.methods import needs
from danceopd.optimizers import adamw_class
from danceopd.tokenizer import tokenize
from danceopd.training.lockstep import Lockstep
from danceopd.training.ranks import ALONE, Ranks
from danceopd.training.state import Checkpoint
from danceopd.training.twins import twin, without_values


@dataclass
class Parts:
    """The student, each route's frozen field in the order of `config.capabilities`, where batches come from.

    anchor: the student as it was before training, frozen, where the method asks for it; save: writes a checkpoint's
    averaged student into a folder, as others load it; combine: the model's own guidance, for `guided`. Of a model also
    drawing_sigmas: noise levels of a finished picture by the latents' shape; load_decoder: loads what decodes latents.
    lockstep: of the sources that ranks share.
    """

    student: nn.Module
    fields: list[Field]
    samples: Samples
    anchor: nn.Module | None
    empty_prompt: Tensors
    device: torch.device
    save: Callable[[Checkpoint, Path], None]
    combine: Callable | None = None
    drawing_sigmas: dict[tuple[int, ...], torch.Tensor] | None = None
    load_decoder: Callable[[], Callable] | None = None
    lockstep: Lockstep | None = None


def build(config: Config, ranks: Ranks = ALONE, settings: dict | None = None) -> Parts:
    """Load the student, the sources and the data; settings: DeepSpeed's, under which `ranks` may share sources.

    Raises UserError that lists every file, row or device that is missing or does not fit.
    """
    problems: list[str] = []

    def attempt(key, function, *args):
        try:
            return function(*args)
        except (ValueError, OSError) as error:
            problems.append(f"{key}: {error}")

    device = attempt("training.device", find_device, config.training.device)
    attempt("training.output_dir", _check_folder, config.training.output_dir)
    attempt("training.optimizer", adamw_class, config.training.optimizer)
    if config.training.base_precision == "fp8":
        attempt("training.base_precision", check_fp8, device)
    elif config.training.base_precision:
        attempt("training.base_precision", check_eight_bit)
    if config.training.rollout_precision == "fp8":
        attempt("training.rollout_precision", check_fp8, device)
    if config.model:
        return _build_model(config, device, attempt, problems, ranks, settings)
    student = attempt("student.init_from", _load, config.student.init_from)
    networks = {
        name: attempt(f"sources.{name}.weights", _load, source.weights) for name, source in config.sources.items()
    }
    image_size = student.config.image_size if student else 32
    for name, network in networks.items():
        if network and student and network.config != student.config:
            problems.append(
                f"sources.{name}.weights: its network {network.config} is not the student's {student.config}"
            )
    data = [
        attempt(f"capabilities.{name}.data", load_data, name, capability, image_size, "clean" in needs(config.method))
        for name, capability in config.capabilities.items()
    ]
    _stop_at(problems)
    empty_prompt = tokenize([""], student.config.text_length)[0].to(device)
    fields = []
    if config.training.base_precision == "fp8":
        networks = {name: to_fp8(network, device) for name, network in networks.items()}
    for capability in config.capabilities.values():
        network = networks[capability.source].to(device).requires_grad_(False)
        fields.append(guided(network, empty_prompt, config.sources[capability.source].guidance_scale))
    anchor = copy.deepcopy(student).to(device).requires_grad_(False) if "anchor" in needs(config.method) else None
    samples = embedded_samples(data, student.config.text_length, image_size)
    shell = without_values(student)

    def save(checkpoint: Checkpoint, folder: Path) -> None:
        save_model(_average(shell, checkpoint), folder / "student.safetensors")

    return Parts(student.to(device), fields, samples, anchor, empty_prompt, device, save)


def _build_model(
    config: Config,
    device: torch.device,
    attempt: Callable,
    problems: list[str],
    ranks: Ranks,
    settings: dict | None,
) -> Parts:
    from danceopd.attention import attention_backend
    from danceopd.backbones import backbone_of, pipeline_class_of  # these import diffusers, which takes its time
    from danceopd.lora import save_lora
    from danceopd.training.models import (
        PRECISIONS,
        check_decoder,
        drawing_sigmas,
        load_networks,
        make_student,
        model_fields,
        model_samples,
        own_networks,
        place_sources,
        read,
    )
    from danceopd.training.sharding import shares_sources
    from danceopd.training.students import save_transformer
    from danceopd.weights import either, of_checkpoint, of_tensors

    backbone = attempt("model", backbone_of, config.model)
    _stop_at(problems)
    samples = model_samples(config, backbone, attempt)
    attempt("training.sample_every", check_decoder, config)
    attends = attempt("training.attention_backend", attention_backend, config, backbone, device)
    _stop_at(problems)
    sigmas = attempt("model", drawing_sigmas, config, backbone, samples)
    lockstep = None if settings is None else Lockstep(ranks)
    empty = own_networks(config, backbone, attempt)
    _stop_at(problems, ranks)  # all or none: what is sharded takes every rank
    in_shards = set()
    if settings is not None and shares_sources(
        config, list({id(n): n for n in empty.values()}.values()), device, lockstep
    ):
        in_shards.add("sources")
    stage = 0 if settings is None else settings.get("zero_optimization", {}).get("stage", 0)
    if stage == 3 and not config.student.lora and "anchor" not in needs(config.method):  # an anchor is a copy of it
        in_shards.add("student")
    student, networks = load_networks(config, backbone, device, attempt, empty, in_shards)
    _stop_at(problems, ranks)
    if "student" in in_shards:
        student = make_student(config, backbone, read(student, ranks, settings), device)
    networks = place_sources(config, backbone, device, networks, lockstep, settings)
    if attends != "native" or config.training.attention_backend == "native":
        student.transformer.set_attention_backend(attends)  # and with it what every other transformer here attends by
    empty_prompt = tree_map(lambda value: value.to(device), samples.groups[0].data[0].empty_prompt())
    combine = getattr(backbone, "combine", None)
    fields = model_fields(config, combine, networks, empty_prompt)
    anchor = copy.deepcopy(student).requires_grad_(False) if "anchor" in needs(config.method) else None
    shell = without_values(student)

    def save(checkpoint: Checkpoint, folder: Path) -> None:
        if config.student.lora:
            save_lora(_average(shell, checkpoint).lora(), folder / "student", pipeline_class_of(config.model))
        else:
            buffers = of_tensors(dict(shell.transformer.named_buffers()))
            weights = either(of_checkpoint(checkpoint, "ema/transformer."), buffers)
            save_transformer(shell.transformer, weights, folder / "student")

    def load_decoder():
        return backbone.picture_codec(config.model, device, PRECISIONS[config.training.precision])[1]

    return Parts(student, fields, samples, anchor, empty_prompt, device, save, combine, sigmas, load_decoder, lockstep)


def _average(shell: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The averaged student of a checkpoint, in float32 on the CPU."""
    return twin(shell, lambda name, p: checkpoint.tensor(f"ema/{name}"))


def _stop_at(problems: list[str], ranks: Ranks = ALONE) -> None:
    """Raise what is wrong; of several `ranks`, on all of them what is wrong on one."""
    for rank, found in sorted(enumerate(ranks.gather(problems)), key=lambda item: item[0] != ranks.rank):
        if found:
            where = "" if rank == ranks.rank else f" on rank {rank}"
            raise UserError("\n  ".join([f"this run cannot start{where}:", *found]))


def _load(weights: str) -> DiT:
    return load_model(resolve_weights(weights))


def find_device(name: str) -> torch.device:
    """The device of a run. Raises UserError for one that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available; use cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_data(name: str, capability, image_size: int, with_clean: bool):
    """The rows of a capability of the embedded network. Raises UserError for rows that do not fit it."""
    data = capability.data
    if data.world:
        return WorldData(data.world, data.size, data.seed)
    rows = ManifestData(data.manifest, capability.capability or name, image_size, root=data.root)
    if capability.task == "edit" and not rows.has_source:
        raise UserError(f"task is edit, but no row of {capability.capability or name!r} has a source_image")
    if capability.task == "t2i" and rows.has_source:
        raise UserError(f"task is t2i, but the rows of {capability.capability or name!r} have a source_image")
    if with_clean and rows.targets([0]) is None:
        raise UserError(f"the method learns from finished pictures, but no row of {name!r} has a target_image")
    return rows


def _check_folder(folder: Path) -> None:
    """Fail now, not after an hour: the folder can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # of a name that no other rank has
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another output_dir") from None


def check_room(folder: Path, parameters: int, checkpoints: int) -> None:
    """The disk has room for what a run writes: so many checkpoints more, and the student.

    parameters: that are trained; each has its value, its average and two states of its optimizer. Raises UserError.
    """
    free, needed = shutil.disk_usage(folder).free, 16 * parameters * checkpoints + 4 * parameters + 2**24
    if free < needed:
        raise UserError(
            f"training.output_dir: {free / 2**20:,.0f} MiB are free at {folder}, but {checkpoints} checkpoints and the "
            f"student need {needed / 2**20:,.0f}; make room, or keep fewer (training.keep_checkpoints)"
        )
