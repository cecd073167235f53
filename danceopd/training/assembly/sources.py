"""Loads the frozen sources of a model's run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from danceopd.config.expressions import expression, texts_by_route
from danceopd.config.sections import Config, Source
from danceopd.core.conditioning import Tensors
from danceopd.core.expressions import Text
from danceopd.core.fields import Field, SharedField, guided
from danceopd.data.sampler import Samples
from danceopd.models.backbones import meta_transformer, pipeline_class_of
from danceopd.models.blocks import without_blocks
from danceopd.models.eight_bit import to_eight_bit
from danceopd.models.fp8 import to_fp8
from danceopd.models.fp8_loading import load_fp8
from danceopd.models.loading import is_file_name, load_transformer_file, stream_blocks, transformer_folder
from danceopd.models.lora_algebra import Lora, cut, merge_into, sum_loras
from danceopd.models.lora_files import load_lora
from danceopd.models.nf4 import to_nf4
from danceopd.models.precision import PRECISIONS
from danceopd.models.shared_base import SharedBase
from danceopd.models.weights import Weights, check_fits, of_folder, of_tensors, plus
from danceopd.support.errors import UserError
from danceopd.support.ranks import ALONE, Ranks
from danceopd.training.zero.lockstep import Lockstep
from danceopd.training.zero.sharding import built, in_turn, sharded


@dataclass
class Unread:
    """Describes a transformer that is to be built, in shards or whole.

    Attributes:
        empty: On the meta device.
        folder: With its configuration.
        weights: What it will hold.
    """

    empty: nn.Module
    folder: Path
    weights: Weights


def own_networks(config: Config, backbone: ModuleType, attempt: Callable) -> dict[str, nn.Module]:
    """Makes the transformer of each source with weights of its own on the meta device.

    Args:
        config: The run's.
        backbone: The module of the model's family.
        attempt: Calls a function, and notes under a key what a user can mend.

    Returns:
        The transformers by source; sources that are the same have one.
    """
    dtype, found, networks = PRECISIONS[config.training.precision], {}, {}
    for name, source in config.networks().items():
        if name in sources_on_base(config):
            continue
        kind = (source.weights, tuple((lora.path, lora.scale, lora.rank) for lora in source.lora))
        if kind not in found:
            folder = source_folder(config, source)
            found[kind] = attempt(f"sources.{name}.weights", meta_transformer, folder, backbone, dtype)
        networks[name] = found[kind]
    return networks


def place_sources(
    config: Config,
    backbone: ModuleType,
    device: torch.device,
    networks: dict,
    lockstep: Lockstep | None,
    settings: dict | None,
) -> dict:
    """Makes sources with transformers of their own fields without guidance, and moves them to where they wait.

    Args:
        config: The run's.
        backbone: The module of the model's family.
        device: Where the run computes.
        networks: As load_networks returns them.
        lockstep: Keeps the ranks in step; every rank calls this.
        settings: DeepSpeed's, which keeps Unread ones in shards.

    Returns:
        The sources as model_fields takes them.
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


def narrow(config: Config, network: nn.Module, device: torch.device | None = None) -> None:
    """Stores a frozen transformer in int8 or NF4 where the run wants that; what is loaded in FP8 is so already.

    Args:
        config: The run's.
        network: The transformer, on any device, changed in place.
        device: Where each layer is converted and left; its own if not given.
    """
    kinds = {"int8": to_eight_bit, "nf4": to_nf4}
    if config.training.base_precision in kinds:
        kinds[config.training.base_precision](network, device)


def needs_base(config: Config) -> bool:
    """Tells whether a run keeps the model's own transformer, frozen: for its student's adapter or for sources.

    Args:
        config: The run's.

    Returns:
        Whether it does.
    """
    return bool(config.student.lora or sources_on_base(config))


def source_folder(config: Config, source: Source) -> Path | str:
    """Finds the folder with the configuration of a source's transformer.

    Args:
        config: The run's.
        source: The source.

    Returns:
        The folder; the model's where the source's weights are a single file, which is of the model's architecture.
    """
    return config.model if source.weights in (None, "base") or is_file_name(source.weights) else source.weights


def sources_on_base(config: Config) -> list[str]:
    """Lists the sources that are the model's own transformer, as it is or with adapters.

    Args:
        config: The run's.

    Returns:
        Their names.
    """
    return [name for name, source in config.networks().items() if source.weights in (None, "base")]


def model_fields(
    config: Config, rule: Callable | None, networks: dict, encoded: Mapping[str, Tensors], transformers: Mapping
) -> Callable[[str], Field]:
    """Makes any source of a run a field, guided or of others where the configuration says so.

    Sources on one transformer are asked in one forward for a mixed batch, with all terms of operators over them.

    Args:
        config: The run's.
        rule: The model's own guidance, for `guided`.
        networks: As place_sources returns them.
        encoded: Of texts that all rows share, and of the empty one, one sample's encoding.
        transformers: By source those whose blocks may be left out.

    Returns:
        The function of a source's name; it raises UserError where blocks cannot be left out.
    """

    ask_of = cache(_ask)  # one field of a network, whichever of its sources asks

    @cache
    def asked(name: str, skipped: tuple[int, ...]) -> tuple[object, Field]:
        shared = networks[name]
        ask = ask_of(shared[0]) if isinstance(shared, tuple) else shared
        network = shared[0] if isinstance(shared, tuple) else shared
        if skipped:
            if name not in transformers:
                raise UserError("skip_layers: its blocks lie in shards; give training.shard_sources: false")
            ask = without_blocks(ask, transformers[name], skipped)
        return network, guided(ask, encoded[""], None, rule)

    keys: dict[tuple, object] = {}  # of networks without some of their blocks, each of which is one for its sources

    def leaf(name: str, skipped: tuple[int, ...] = (), scale: float = 1.0) -> SharedField:
        network, ask = asked(name, skipped)
        key = keys.setdefault((id(network), skipped), object()) if skipped else network
        adapter = networks[name][1] if isinstance(networks[name], tuple) else -1
        return SharedField(key, ask, adapter, scale, config.sources[name].embedded_guidance)

    @cache
    def text(name: str) -> Text:
        return Text(name, encoded.get(name))

    def field(name: str) -> Field:
        if config.sources[name].operator():
            return expression(config, name, leaf, text, rule)
        return leaf(name, scale=config.sources[name].guidance_scale)

    return field


def shared_texts(config: Config, samples: Samples) -> dict[str, Tensors]:
    """Reads the encodings of the texts that sources are asked with and that all rows share.

    Args:
        config: The run's.
        samples: Its prepared rows.

    Returns:
        By the text one sample's encoding, without the batch; the empty prompt's is among them.
    """
    data = samples.groups[0].data
    found = {"": data[0].empty_prompt()}
    for rows, own in zip(data, texts_by_route(config), strict=True):
        found |= {text: one for text in own if (one := rows.encoded(text)) is not None}
    return found


def _ask(shared: SharedBase) -> Field:
    """Makes a shared transformer the field that its samples' adapters answer."""
    return lambda latents, sigma, conditioning: shared(latents, sigma, conditioning, conditioning.adapter)


def source_lora(source: Source, transformer: nn.Module, pipeline_class: type, base: Weights | None = None) -> Lora:
    """Reads a source's adapters as one, and says what of them is cut.

    Args:
        source: The source; one of the base alone has none.
        transformer: Whose layers they change, on any device.
        pipeline_class: Diffusers' class of the pipeline.
        base: The weights that they lie on; the transformer's own if not given.

    Returns:
        Their sum; empty for the base itself.

    Raises:
        UserError: As load_lora.
    """
    loras = []
    for file in source.lora:
        lora = load_lora(file.path, transformer, pipeline_class, file.scale, base=base)
        if file.rank is not None:
            lora, lost = cut(lora, file.rank)
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"{file.path}: cut to rank {file.rank}, which leaves out {lost:.2%} of its change's norm")
        loras.append(lora)
    return sum_loras(loras)


def _field(network: nn.Module, backbone: ModuleType) -> Field:
    """Makes a transformer of its own a field."""
    return SharedBase(network, [], backbone.velocity).field(-1)


def _own_weights(source: Source, config: Config, backbone: ModuleType, empty: nn.Module) -> nn.Module:
    """Loads a source's own transformer, on the CPU in the dtype of the empty one, with its adapters merged."""
    if is_file_name(source.weights):
        network = load_transformer_file(source.weights, empty, config.model, empty.dtype)
    else:
        network = backbone.load_transformer(source.weights, empty.dtype)
    return merge_into(network, source_lora(source, network, pipeline_class_of(config.model)))


def _unread(source: Source, config: Config, _: ModuleType, empty: nn.Module) -> Unread:
    """Finds the weights of a source's own transformer, to be built later.

    A single file is read as a whole: diffusers converts its layout so.
    """
    if is_file_name(source.weights):
        found = of_tensors(load_transformer_file(source.weights, empty, config.model, torch.float32).state_dict())
    else:
        found = of_folder(source.weights)
        check_fits(found, empty, source.weights)
    lora = source_lora(source, empty, pipeline_class_of(config.model), found)
    return Unread(empty, transformer_folder(source_folder(config, source)), plus(found, lora))


def read(network: Unread, ranks: Ranks = ALONE, settings: dict | None = None) -> nn.Module:
    """Reads the transformer, on the CPU, in eval mode.

    Args:
        network: What is to be built.
        ranks: The processes of the run.
        settings: DeepSpeed's, with which each of the ranks holds a shard of it; None for the whole.

    Returns:
        The transformer.
    """
    return built(network.folder, network.weights, network.empty.dtype, ranks, settings)


def _load(config: Config, backbone: ModuleType, folder, device: torch.device | None, lora: Lora | None = None):
    """Loads a frozen transformer, an adapter merged into it; in FP8, where it is wanted, on the device."""
    dtype = PRECISIONS[config.training.precision]
    if config.training.base_precision == "fp8":
        return load_fp8(folder, backbone, dtype, device, lora)
    return merge_into(backbone.load_transformer(folder, dtype), lora or {})


def _own_frozen(
    source: Source, config: Config, backbone: ModuleType, empty: nn.Module, device: torch.device | None
) -> nn.Module:
    """Loads a source's own transformer to be asked, with its adapters merged."""
    fp8, device = config.training.base_precision == "fp8", None if config.training.offload_sources else device
    if fp8 and not is_file_name(source.weights):
        lora = source_lora(source, empty, pipeline_class_of(config.model), of_folder(source.weights))
        return _load(config, backbone, source.weights, device, lora)
    network = _own_weights(source, config, backbone, empty)
    return to_fp8(network, device) if fp8 else network


def _placed(network: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Puts a source's transformer where it waits to be asked: on the device, or in host memory."""
    offload = config.training.offload_sources
    narrow(config, network, None if offload else device)
    return stream_blocks(network, device) if offload else network.to(device)


def check_embedded(transformer: nn.Module, given: float | None) -> None:
    """Checks that an embedded guidance is given where a transformer takes one, and nowhere else.

    Args:
        transformer: The one that is asked.
        given: What the configuration gives.

    Raises:
        UserError: It is not.
    """
    takes, name = getattr(transformer.config, "guidance_embeds", False), type(transformer).__name__
    if takes and given is None:
        raise UserError(f"this {name} takes its guidance as an input; give the number, such as its pipeline's default")
    if not takes and given is not None:
        raise UserError(f"this {name} has no such input; leave it out, and give guidance_scale for guidance")
