"""Loads the networks of a model's run."""

from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from danceopd.config.sections import Config
from danceopd.models.backbones import meta_transformer, pipeline_class_of
from danceopd.models.blocks import preset_layers
from danceopd.models.loading import transformer_folder
from danceopd.models.lora_algebra import Lora
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import FullStudent, LoraStudent, layer_sizes
from danceopd.models.weights import Weights, check_fits, of_folder
from danceopd.support.errors import UserError
from danceopd.training.assembly.sources import (
    Unread,
    _load,
    _own_frozen,
    _unread,
    check_embedded,
    narrow,
    needs_base,
    read,
    source_folder,
    source_lora,
    sources_on_base,
)
from danceopd.training.assembly.starts import begin, start_lora, start_weights


# Long: each problem is noted, and the rest is still looked at.
def load_networks(
    config: Config,
    backbone: ModuleType,
    device: torch.device,
    attempt: Callable,
    empty: dict[str, nn.Module],
    in_shards: Container[str] = (),
):
    """Loads the student and the sources: adapters on one transformer, other weights on the host.

    A student of all weights is a transformer of its own, and the model's is loaded only where a source needs it.

    Args:
        config: The run's.
        backbone: The module of the model's family.
        device: Where the run computes.
        attempt: Calls a function, and notes under a key what a user can mend.
        empty: As own_networks makes it.
        in_shards: "student" and "sources" where these are Unread.

    Returns:
        The student, and {source: (base, adapter) or a transformer}; (None, None) where something cannot be loaded.
    """
    transformer, layers, swap = None, [], config.training.swap_blocks
    if needs_base(config):
        transformer = attempt("model", _load, config, backbone, config.model, None if swap else device)
        if transformer is None:
            return None, None
    if config.student.lora:
        layers = attempt("student.lora.targets", student_layers, config, backbone, transformer)
        if layers and attempt("student.lora", student_sizes, config, layers) is None:
            layers = None
    pipeline_class = pipeline_class_of(config.model)
    on_base = sources_on_base(config)
    base = of_folder(config.model) if transformer else None
    loras = {
        name: attempt(f"sources.{name}.lora", source_lora, source, transformer, pipeline_class, base)
        for name, source in config.networks().items()
        if name in on_base
    }
    load = _unread if "sources" in in_shards else partial(_own_frozen, device=device)
    loaded = {}  # by network: of sources of the same weights and adapters there is one
    for name, network in empty.items():
        if id(network) not in loaded:
            source = config.sources[name]
            loaded[id(network)] = attempt(f"sources.{name}.weights", load, source, config, backbone, network)
    others = {name: loaded[id(network)] for name, network in empty.items()}
    own = transformer
    if not config.student.lora:
        own = attempt("student.init_from", meta_transformer, start_folder(config), backbone, torch.float32)
    if own:
        attempt("student.embedded_guidance", check_embedded, own, config.student.embedded_guidance)
    for name, source in config.networks().items():
        network = empty.get(name) or transformer
        if network:
            attempt(f"sources.{name}.embedded_guidance", check_embedded, network, source.embedded_guidance)
    if layers is None or own is None or None in loras.values() or None in others.values():
        return None, None
    if config.student.lora:
        start = attempt("student.init_from", start_lora, config, loras, layers)
    else:
        start = attempt("student.init_from", _unread_start, config, loras, own, empty)
        if start and "student" not in in_shards:
            start = attempt("student.init_from", read, start)
    if start is None:
        return None, None
    shared = None
    if transformer:
        narrow(config, transformer, None if swap else device)
        adapters = [lora for lora in loras.values() if lora]
        shared = SharedBase(transformer if swap else transformer.to(device), adapters, backbone.velocity, layers)
        if swap:
            attempt("training.swap_blocks", shared.swap_blocks, swap, device)
    student = start if isinstance(start, Unread) else make_student(config, backbone, start, device, shared, layers)
    place = {name: i for i, name in enumerate(name for name, lora in loras.items() if lora)}
    return student, {name: (shared, place.get(name, -1)) for name in on_base} | others  # -1: the base itself


def make_student(
    config: Config,
    backbone: ModuleType,
    start: Lora | nn.Module,
    device: torch.device,
    shared: SharedBase | None = None,
    layers: Sequence[str] = (),
) -> nn.Module:
    """Makes the student on its device, as it begins: as an adapter on shared, or as a transformer.

    Args:
        config: The run's.
        backbone: The module of the model's family.
        start: What it begins as: an adapter, or a transformer in float32.
        device: Where the run computes.
        shared: The transformer that an adapter lies on.
        layers: The layers that an adapter changes.

    Returns:
        The student.
    """
    lora, embedded = config.student.lora, config.student.embedded_guidance
    checkpointing = config.training.gradient_checkpointing
    if lora is None:
        if checkpointing:
            start.enable_gradient_checkpointing()
        autocast = torch.bfloat16 if config.training.precision == "bf16" else None
        return FullStudent(start.to(device), backbone.velocity, embedded, autocast)
    if checkpointing:
        shared.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(config.training.seed)
    sizes, gaussian = student_sizes(config, layers), lora.init == "gaussian"
    student = LoraStudent(shared, layers, lora.rank, lora.alpha or lora.rank, generator, embedded, sizes, gaussian)
    begin(student, start)
    return student.to(device)


def start_folder(config: Config) -> Path | str:
    """Finds the folder with the configuration of the transformer that a student begins as, or that it adapts.

    Args:
        config: The run's.

    Returns:
        The folder, of the model or of a source.
    """
    source = config.sources.get(config.student.init_from)
    return config.model if source is None else source_folder(config, source)


def student_layers(config: Config, backbone: ModuleType, transformer: nn.Module) -> list[str]:
    """Finds the layers that the student's adapter changes.

    Args:
        config: The run's, whose targets are taken where it gives some.
        backbone: The module of the model's family, whose list is that of its largest model.
        transformer: The transformer that is adapted.

    Returns:
        Their names; of the family's list those that are there.

    Raises:
        UserError: As target_layers does.
    """
    targets = config.student.lora.targets
    if targets == []:
        raise UserError("it names no layer; leave it out for the family's usual ones")
    if isinstance(targets, str):
        return preset_layers(transformer, targets)
    return target_layers(transformer, targets or backbone.LORA_TARGETS, every=bool(targets))


def student_sizes(config: Config, layers: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Finds the ranks and alphas of the student's adapter.

    Args:
        config: The run's.
        layers: The layers that it changes.

    Returns:
        {layer: (rank, alpha)}.

    Raises:
        UserError: A pattern names none of the layers.
    """
    lora = config.student.lora
    return layer_sizes(layers, lora.rank, lora.alpha, lora.rank_pattern, lora.alpha_pattern)


def _unread_start(config: Config, loras: dict[str, Lora], empty: nn.Module, others: dict[str, nn.Module]) -> Unread:
    """Finds what a student of all weights begins as."""

    def own(name: str) -> Weights:
        return _unread(config.sources[name], config, None, others[name]).weights

    folder, weights = transformer_folder(start_folder(config)), start_weights(config, loras, own)
    check_fits(weights, empty, folder)
    return Unread(empty, folder, weights)
