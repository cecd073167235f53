"""A run on a diffusers model: one frozen transformer that carries the student's adapter and the sources'."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from danceopd.backbones import meta_transformer, pipeline_class_of
from danceopd.backbones.loading import (
    check_weights,
    class_name_of,
    is_file_name,
    load_transformer_file,
    stream_blocks,
    transformer_folder,
)
from danceopd.config import Config, Source
from danceopd.data.prepare import check_encoders, fingerprints
from danceopd.data.prepared import PreparedData, mix
from danceopd.data.sampler import Group, Samples
from danceopd.eight_bit import to_eight_bit
from danceopd.errors import UserError
from danceopd.fields import Field, SharedField, guided
from danceopd.fp8 import load_fp8, to_fp8
from danceopd.lora import Lora, LoraStudent, SharedBase, combine, load_lora, merge_into, target_layers
from danceopd.methods import needs
from danceopd.training.lockstep import Lockstep
from danceopd.training.ranks import ALONE, Ranks
from danceopd.training.sharding import built, in_turn, sharded
from danceopd.training.students import FullStudent, begin, start_lora, start_weights
from danceopd.weights import Weights, check_fits, of_folder, of_tensors, plus

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_samples(config: Config, backbone: ModuleType, attempt: Callable) -> Samples | None:
    """The prepared rows of every capability in groups that may share a batch; None where some cannot be used."""
    steps = config.rollout.num_inference_steps
    encoders = fingerprints(config.model)
    for name, capability in config.capabilities.items():
        attempt(f"capabilities.{name}.task", _check_task, capability.task, backbone, config.model)
    data = {}
    for name, capability in config.capabilities.items():
        key, path = f"capabilities.{name}.data.prepared", capability.data.prepared
        data[name] = rows = attempt(key, rows_of, path, name, capability, "clean" in needs(config.method))
        if rows:
            attempt(key, check_encoders, path, rows.head, config.model, encoders)
    mixing = None if None in data.values() else attempt("capabilities", mix, data)
    if mixing is None:
        return None
    groups, part = [], cache(lambda name, kind: data[name].part(kind))  # one data set for equal rows of two groups
    for kind, rows in mixing.rows.items():
        shape, *sources = (attempt("model", backbone.latent_shape, config.model, *size) for size in (kind[0], *kind[1]))
        sigmas = attempt("model", backbone.sigmas, config.model, steps, *kind[0])
        if None in (shape, *sources) or sigmas is None:
            return None
        group = [part(name, own.own(kind)) for name, own in data.items()]
        groups.append(Group(group, shape, rows, sigmas, tuple(sources)))
    return Samples(
        groups, lambda rows, indices, without_prompt: rows.condition(indices, without_prompt), tuple(mixing.never_drawn)
    )


def drawing_sigmas(config: Config, backbone: ModuleType, samples: Samples) -> dict[tuple[int, ...], torch.Tensor]:
    """{latents' shape: noise levels of a picture drawn in evaluation.num_inference_steps}."""
    steps = config.evaluation.num_inference_steps
    sizes = {g.shape: next(tuple(rows.rows[0]["size"]) for rows in g.data if len(rows)) for g in samples.groups}
    return {tuple(shape): backbone.sigmas(config.model, steps, *size) for shape, size in sizes.items()}


def check_decoder(config: Config) -> None:
    """Sample grids need the VAE. Raises UserError where they are drawn and it is not there."""
    if config.training.sample_every and (config.model / "vae" / "config.json").is_file():  # else latent_shape says it
        try:
            check_weights(config.model / "vae")
        except UserError as error:
            raise UserError(f"sample grids are decoded by the VAE, but {error}; or give 0 for none") from None


def _check_task(task: str, backbone: ModuleType, model) -> None:
    if task not in backbone.tasks(model):
        raise UserError(
            f"{task}, but a {class_name_of(model)} has no source pictures; use the family's model that edits"
        )


def rows_of(path, name: str, capability, with_clean: bool) -> PreparedData:
    """The prepared rows of a capability. Raises UserError for a file or rows that cannot be used.

    with_clean: whether the method learns from finished pictures.
    """
    data = PreparedData(path, capability.capability or name)
    if (capability.task == "edit") != data.has_source:
        raise UserError(
            f"task is {capability.task}, but its rows have {'' if data.has_source else 'no '}source pictures"
        )
    lacking = sum(row["target"] is None for row in data.rows)
    if with_clean and lacking:
        raise UserError(
            f"the method learns from finished pictures, but {lacking} of its {len(data)} rows have no target_image"
        )
    return data


@dataclass
class Unread:
    """A transformer that is to be built, in shards or whole.

    empty: on the meta device; folder: with its configuration; weights: what it will hold.
    """

    empty: nn.Module
    folder: Path
    weights: Weights


def own_networks(config: Config, backbone: ModuleType, attempt: Callable) -> dict[str, nn.Module]:
    """{source of its own weights: its transformer on the meta device}; one network for sources that are the same."""
    dtype, found, networks = PRECISIONS[config.training.precision], {}, {}
    for name, source in config.sources.items():
        if name in sources_on_base(config):
            continue
        kind = (source.weights, tuple((lora.path, lora.scale) for lora in source.lora))
        if kind not in found:
            folder = source_folder(config, source)
            found[kind] = attempt(f"sources.{name}.weights", meta_transformer, folder, backbone, dtype)
        networks[name] = found[kind]
    return networks


def load_networks(
    config: Config,
    backbone: ModuleType,
    device: torch.device,
    attempt: Callable,
    empty: dict[str, nn.Module],
    in_shards: Container[str] = (),
):
    """(student, {source: (base, adapter) or a transformer}): adapters on one transformer, other weights on the host.

    A student of all weights is a transformer of its own, and the model's is loaded only where a source needs it.
    empty: of own_networks; in_shards: "student" and "sources" are Unread. Where something cannot be loaded, attempt
    takes the message and the result is (None, None).
    """
    transformer, layers = None, []
    if needs_base(config):
        transformer = attempt("model", _load, config, backbone, config.model, device)
        if transformer is None:
            return None, None
    if config.student.lora:
        layers = attempt("student.lora.targets", student_layers, config, backbone, transformer)
    pipeline_class = pipeline_class_of(config.model)
    on_base = sources_on_base(config)
    loras = {
        name: attempt(f"sources.{name}.lora", _sum, source, transformer, pipeline_class)
        for name, source in config.sources.items()
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
        attempt("student.embedded_guidance", _check_embedded, own, config.student.embedded_guidance)
    for name, source in config.sources.items():
        network = empty.get(name) or transformer
        if network:
            attempt(f"sources.{name}.embedded_guidance", _check_embedded, network, source.embedded_guidance)
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
        if config.training.base_precision == "int8":
            to_eight_bit(transformer, device)
        adapters = [lora for lora in loras.values() if lora]
        shared = SharedBase(transformer.to(device), adapters, backbone.velocity, layers)
    student = start if isinstance(start, Unread) else make_student(config, backbone, start, device, shared, layers)
    place = {name: i for i, name in enumerate(name for name, lora in loras.items() if lora)}
    return student, {name: (shared, place.get(name, -1)) for name in on_base} | others  # -1: the base itself


def place_sources(
    config: Config,
    backbone: ModuleType,
    device: torch.device,
    networks: dict,
    lockstep: Lockstep | None,
    settings: dict | None,
) -> dict:
    """The sources of load_networks as model_fields takes them: transformers of their own as fields without guidance.

    lockstep, settings: of the ranks and DeepSpeed, which keeps them in shards where they are Unread; every rank calls
    it.
    """
    placed = {}
    for network in networks.values():
        if isinstance(network, tuple) or id(network) in placed:  # two may be one network
            continue
        if isinstance(network, Unread):
            own = sharded(read(network, lockstep.ranks, settings), settings)
            placed[id(network)] = in_turn(_field(own, backbone), lockstep)
        else:
            placed[id(network)] = _field(_placed(network, config, device), backbone)
    return {name: placed.get(id(network), network) for name, network in networks.items()}


def make_student(
    config: Config,
    backbone: ModuleType,
    start: Lora | nn.Module,
    device: torch.device,
    shared: SharedBase | None = None,
    layers: Sequence[str] = (),
) -> nn.Module:
    """The student on its device, as it begins: as an adapter on shared, or as a transformer."""
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
    student = LoraStudent(shared, layers, lora.rank, lora.alpha or lora.rank, generator, embedded)
    begin(student, start)
    return student.to(device)


def needs_base(config: Config) -> bool:
    """Whether a run keeps the model's own transformer, frozen: for its student's adapter or for sources."""
    return bool(config.student.lora or sources_on_base(config))


def start_folder(config: Config) -> Path | str:
    """The folder with the configuration of the transformer that a student begins as, or that its adapter is of."""
    source = config.sources.get(config.student.init_from)
    return config.model if source is None else source_folder(config, source)


def source_folder(config: Config, source: Source) -> Path | str:
    """The folder with the configuration of a source's transformer: a single file is of the model's architecture."""
    return config.model if source.weights in (None, "base") or is_file_name(source.weights) else source.weights


def sources_on_base(config: Config) -> list[str]:
    """The sources that are the model's own transformer, as it is or with adapters."""
    return [name for name, source in config.sources.items() if source.weights in (None, "base")]


def student_layers(config: Config, backbone: ModuleType, transformer: nn.Module) -> list[str]:
    """The layers that the student's adapter changes: the configuration's, or those of the family that are there.

    A family's list is that of its largest model. Raises UserError as target_layers does.
    """
    targets = config.student.lora.targets
    return target_layers(transformer, targets or backbone.LORA_TARGETS, every=bool(targets))


def model_fields(config: Config, combination: Callable | None, fields: dict, empty_prompt) -> list[Field]:
    """Each route's field, in the order of the capabilities, guided where the configuration says so.

    combination: the model's own guidance, for `guided`. Sources on one transformer are asked in one forward for a
    mixed batch.
    """
    result = []
    for capability in config.capabilities.values():
        field, source = fields[capability.source], config.sources[capability.source]
        scale, embedded = source.guidance_scale, source.embedded_guidance
        if isinstance(field, tuple):
            shared, adapter = field
            ask = guided(_ask(shared), empty_prompt, None, combination)
            result.append(SharedField(shared, ask, adapter, scale, embedded))
        else:
            result.append(guided(_embedding(field, embedded), empty_prompt, scale, combination))
    return result


def _ask(shared: SharedBase) -> Field:
    return lambda latents, sigma, conditioning: shared(latents, sigma, conditioning, conditioning.adapter)


def _sum(source: Source, transformer: nn.Module, pipeline_class: type) -> Lora:
    """The source's adapters as one; empty for the base itself."""
    return combine([load_lora(lora.path, transformer, pipeline_class, lora.scale) for lora in source.lora])


def _field(network: nn.Module, backbone: ModuleType) -> Field:
    """A transformer of its own as a field."""
    return SharedBase(network, [], backbone.velocity).field(-1)


def _own_weights(source: Source, config: Config, backbone: ModuleType, empty: nn.Module) -> nn.Module:
    """A source's own transformer, on the CPU in the dtype of the empty one, with its adapters merged."""
    if is_file_name(source.weights):
        network = load_transformer_file(source.weights, empty, config.model, empty.dtype)
    else:
        network = backbone.load_transformer(source.weights, empty.dtype)
    return merge_into(network, _sum(source, network, pipeline_class_of(config.model)))


def _unread(source: Source, config: Config, _: ModuleType, empty: nn.Module) -> Unread:
    """The same, to be built. A single file is read as a whole: diffusers converts its layout so."""
    if is_file_name(source.weights):
        found = of_tensors(load_transformer_file(source.weights, empty, config.model, torch.float32).state_dict())
    else:
        found = of_folder(source.weights)
        check_fits(found, empty, source.weights)
    lora = _sum(source, empty, pipeline_class_of(config.model))
    return Unread(empty, transformer_folder(source_folder(config, source)), plus(found, lora))


def _unread_start(config: Config, loras: dict[str, Lora], empty: nn.Module, others: dict[str, nn.Module]) -> Unread:
    """What a student of all weights begins as."""

    def own(name: str) -> Weights:
        return _unread(config.sources[name], config, None, others[name]).weights

    folder, weights = transformer_folder(start_folder(config)), start_weights(config, loras, own)
    check_fits(weights, empty, folder)
    return Unread(empty, folder, weights)


def read(network: Unread, ranks: Ranks = ALONE, settings: dict | None = None) -> nn.Module:
    """The transformer, on the CPU, in eval mode; with DeepSpeed's settings each of the ranks holds a shard of it."""
    return built(network.folder, network.weights, network.empty.dtype, ranks, settings)


def _load(config: Config, backbone: ModuleType, folder, device: torch.device | None, lora: Lora | None = None):
    """A frozen transformer, an adapter merged into it; in FP8, where it is wanted, on the device."""
    dtype = PRECISIONS[config.training.precision]
    if config.training.base_precision == "fp8":
        return load_fp8(folder, backbone, dtype, device, lora)
    return merge_into(backbone.load_transformer(folder, dtype), lora or {})


def _own_frozen(
    source: Source, config: Config, backbone: ModuleType, empty: nn.Module, device: torch.device | None
) -> nn.Module:
    """A source's own transformer to be asked, with its adapters merged."""
    fp8, device = config.training.base_precision == "fp8", None if config.training.offload_sources else device
    if fp8 and not is_file_name(source.weights):
        lora = _sum(source, empty, pipeline_class_of(config.model))
        return _load(config, backbone, source.weights, device, lora)
    network = _own_weights(source, config, backbone, empty)
    return to_fp8(network, device) if fp8 else network


def _placed(network: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """A source's transformer as it waits to be asked: on the device, or in host memory."""
    offload = config.training.offload_sources
    if config.training.base_precision == "int8":
        to_eight_bit(network, None if offload else device)
    return stream_blocks(network, device) if offload else network.to(device)


def _embedding(field: Field, guidance: float | None) -> Field:
    return lambda latents, sigma, conditioning: field(latents, sigma, conditioning.embedding(guidance))


def _check_embedded(transformer: nn.Module, given: float | None) -> None:
    takes, name = getattr(transformer.config, "guidance_embeds", False), type(transformer).__name__
    if takes and given is None:
        raise UserError(f"this {name} takes its guidance as an input; give the number, such as its pipeline's default")
    if not takes and given is not None:
        raise UserError(f"this {name} has no such input; leave it out, and give guidance_scale for guidance")
