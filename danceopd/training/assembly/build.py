"""Everything a run needs, found and loaded before the first step; what is missing is listed at once."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from danceopd.config.sections import Config
from danceopd.core.fields import Field, guided
from danceopd.core.methods import needs
from danceopd.models.eight_bit import check_eight_bit
from danceopd.models.fp8 import check_fp8, to_fp8
from danceopd.models.twins import without_values
from danceopd.support.devices import find_device
from danceopd.support.optimizers import adamw_class
from danceopd.support.ranks import ALONE, Ranks
from danceopd.training.assembly.parts import Parts, _average, _stop_at
from danceopd.training.assembly.room import _check_folder
from danceopd.training.checkpoints import Checkpoint
from danceopd.training.zero.lockstep import Lockstep
from danceopd.world.build import _load, load_data
from danceopd.world.files import save_model
from danceopd.world.sampling import embedded_samples
from danceopd.world.scoring import quick_scores
from danceopd.world.tokenizer import tokenize


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

    def score(network: Field) -> dict:
        return quick_scores(network, config, shell.config, device)

    return Parts(student.to(device), fields, samples, anchor, empty_prompt, device, save, score=score)


def _build_model(
    config: Config,
    device: torch.device,
    attempt: Callable,
    problems: list[str],
    ranks: Ranks,
    settings: dict | None,
) -> Parts:
    from danceopd.models.attention import attention_backend
    from danceopd.models.backbones import (
        backbone_of,  # these import diffusers, which takes its time
        pipeline_class_of,
    )
    from danceopd.models.lora_files import save_lora
    from danceopd.models.precision import PRECISIONS
    from danceopd.models.saving import save_transformer
    from danceopd.models.weights import either, of_tensors
    from danceopd.training.assembly.networks import load_networks, make_student
    from danceopd.training.assembly.samples import check_decoder, drawing_sigmas, model_samples
    from danceopd.training.assembly.sources import model_fields, own_networks, place_sources, read
    from danceopd.training.checkpoints import of_checkpoint
    from danceopd.training.zero.sharding import shares_sources

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
