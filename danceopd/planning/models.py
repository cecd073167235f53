"""What a model's run takes."""

import json
import math
from pathlib import Path

import torch
from torch import nn

from danceopd.config.sections import Config
from danceopd.core.methods import needs
from danceopd.models.backbones import meta_transformer
from danceopd.models.eight_bit import check_eight_bit, to_eight_bit
from danceopd.models.fp8 import to_fp8
from danceopd.models.loading import check_transformer_file, check_weights, is_file_name
from danceopd.planning.backward import _bytes_of, kept_for_backward, operations
from danceopd.planning.memory import FLOAT, Plan, _add_activations, _add_states, _trained, count, micro_batch, nbytes
from danceopd.support.errors import UserError

PREPARATION = ("text_encoder", "tokenizer", "processor", "image_encoder", "feature_extractor", "siglip")


def _model(config: Config, plan: Plan, device: torch.device | None) -> None:
    from danceopd.models.attention import attention_backend
    from danceopd.models.backbones import (
        backbone_of,  # these import diffusers, which takes its time
        pipeline_class_of,
    )
    from danceopd.models.lora_files import lora_parameters
    from danceopd.models.precision import PRECISIONS
    from danceopd.training.assembly.samples import check_decoder, model_samples
    from danceopd.training.assembly.sources import needs_base, sources_on_base

    attempt, dtype = plan.attempt, PRECISIONS[config.training.precision]
    narrow = {None: None, "fp8": to_fp8}.get(config.training.base_precision, to_eight_bit)
    if narrow is to_eight_bit and not attempt("training.base_precision", check_eight_bit):
        narrow = None
    backbone = attempt("model", backbone_of, config.model)
    samples = model_samples(config, backbone, attempt) if backbone else _rows_alone(config, plan)
    if backbone is None:
        return
    plan.found.append(_parts(config.model))
    if device:
        attends = attempt("training.attention_backend", attention_backend, config, backbone, device)
        plan.found += [f"attention backend: {attends}"] if attends else []
    for m, (name, capability) in enumerate(config.capabilities.items()) if samples else ():
        rows = sum(map(len, {id(group.data[m]): group.data[m] for group in samples.groups}.values()))
        plan.found.append(f"{name}: {rows} rows in {capability.data.prepared}")
    plan.found += samples.never_drawn if samples else ()
    transformer = attempt("model", meta_transformer, config.model, backbone, dtype)
    if needs_base(config) or config.student.init_from == "base":
        attempt("model", check_weights, config.model)
    attempt("training.sample_every", check_decoder, config)
    sources, networks = {}, {}
    for name, source in config.sources.items():
        carrier = transformer  # of the source's adapters
        if name not in sources_on_base(config):
            carrier = networks[name] = _own_transformer(config, name, backbone, transformer, attempt)
        files = [
            carrier
            and attempt(f"sources.{name}.lora", lora_parameters, lora.path, carrier, pipeline_class_of(config.model))
            for lora in source.lora
        ]
        if name in networks:
            sources[name] = carrier and count(carrier)  # adapters are merged into it
        else:
            sources[name] = None if None in files else sum(parameters for parameters, _ in files)
        for lora, result in zip(source.lora, files, strict=True):
            if result:
                checked = "all keys fit" if result[1] else "keys are checked when it is loaded: its layout needs values"
                plan.found.append(f"{name}: {lora.path}, {checked}")
    if transformer is None:
        return
    if needs_base(config):
        plan.parameters["base"] = count(transformer)
    plan.parameters |= {f"source {name}, beside the base": n for name, n in sources.items() if n is not None}
    size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
    how = f"{size} bytes, {name}"
    if narrow:
        how = f"1 byte in the blocks' linear layers, {size} elsewhere"
        for network in filter(None, (transformer, *networks.values())):
            narrow(network)
    if needs_base(config):
        plan.memory["base weights"] = nbytes(transformer), f"{count(transformer):,} x {how}, shared"
    total = sum(n for source, n in sources.items() if n and source not in networks)
    plan.memory["sources beside the base"] = total * size, f"{total:,} x {size} bytes, {name}"
    _add_networks(config, plan, [network for network in networks.values() if network], how)
    student = _model_student(config, plan, backbone, transformer)
    if student is None:
        return
    _trained(config, plan, student)
    autocast, trained = None, transformer
    if not config.student.lora:
        trained = student.transformer
        if dtype != torch.float32:
            autocast, n = dtype, count(trained)
            plan.memory[f"student in {name}"] = n * size, f"{n:,} x {size} bytes, of a forward by autocast"
    if samples is None:
        return
    micro = micro_batch(config)
    group = max(samples.groups, key=lambda g: sum(map(math.prod, (g.shape, *g.source_shapes))))
    seen, conditionings = [], {}
    for name, rows in zip(config.capabilities, group.data, strict=True):
        conditioning = conditionings[name] = attempt(f"capabilities.{name}.data", samples.condition, rows, [0], [False])
        if conditioning is None:
            return
        seen.append(
            (*kept_for_backward(student, trained, group.shape, conditioning, autocast), _bytes_of(conditioning))
        )
    plain, checkpointed = (max(values) for values in list(zip(*seen, strict=True))[:2])
    _add_activations(config, plan, plain, checkpointed)
    latents = FLOAT * math.prod(group.shape)
    _add_states(config, plan, latents)
    inputs = micro * (latents + max(size for *_, size in seen))
    plan.operations = lambda: {name: operations(student, group.shape, c) for name, c in conditionings.items()}
    plan.memory["latents, prompts, sources"] = inputs, f"{micro} samples of the largest picture size, as prepared"


def _model_student(config: Config, plan: Plan, backbone, transformer: nn.Module) -> nn.Module | None:
    """The student on the meta device, or None where a problem is in its way."""
    from danceopd.models.shared_base import SharedBase
    from danceopd.models.students import FullStudent, LoraStudent
    from danceopd.training.assembly.networks import student_layers

    def velocity(transformer, latents, sigma, prompt, sources=(), *_, **__):
        return backbone.velocity(transformer, latents, sigma, prompt, sources, 1.0)

    lora = config.student.lora
    if lora is None:
        start = plan.attempt("student.init_from", _meta_start, config, backbone)
        return start and FullStudent(start, velocity)
    layers = plan.attempt("student.lora.targets", student_layers, config, backbone, transformer)
    if layers is None:
        return None
    cut = plan.attempt("student.init_from", _cut_layers, config, transformer, layers)
    if cut:
        plan.found.append(f"student: begins as {config.student.init_from}, cut to rank {lora.rank} in {cut} layers")
    with torch.device("meta"):
        return LoraStudent(SharedBase(transformer, [], velocity, layers), layers, lora.rank, lora.alpha or lora.rank)


def _meta_start(config: Config, backbone) -> nn.Module:
    """The transformer that a full student begins as. Raises UserError for a merge of transformers that differ."""
    from danceopd.models.weights import shapes_of
    from danceopd.training.assembly.networks import start_folder
    from danceopd.training.assembly.sources import source_folder, sources_on_base
    from danceopd.training.assembly.starts import check_alike

    parts = {"model": start_folder(config)}
    if config.student.init_from == "merge":
        on_base = sources_on_base(config)
        own = {f"source {name}": source_folder(config, s) for name, s in config.sources.items() if name not in on_base}
        parts = (parts if on_base else {}) | own
    networks = {name: meta_transformer(folder, backbone, torch.float32) for name, folder in parts.items()}
    (first, start), *others = networks.items()
    for name, network in others:
        check_alike(first, shapes_of(start), name, shapes_of(network))
    return start


def _cut_layers(config: Config, transformer: nn.Module, layers: list[str]) -> int:
    """In how many layers what a LoRA student begins as has a larger rank. Raises UserError as start_lora does.

    Files whose conversion depends on values say nothing here.
    """
    from danceopd.models.backbones import pipeline_class_of
    from danceopd.models.lora_algebra import combine
    from danceopd.models.lora_files import load_lora
    from danceopd.training.assembly.starts import start_lora

    pipeline_class, loras = pipeline_class_of(config.model), {}
    for name, source in config.sources.items():
        if config.student.init_from not in (name, "merge"):
            continue
        try:
            loras[name] = combine([load_lora(x.path, transformer, pipeline_class, 1.0, True) for x in source.lora])
        except (UserError, RuntimeError):  # said of the source, where it is a problem
            return 0
    return sum(len(a) > config.student.lora.rank for a, _, _ in start_lora(config, loras, layers).values())


def _rows_alone(config: Config, plan: Plan) -> None:
    """Without a model nothing can be made of prepared rows, but what is wrong with them is said too."""
    from danceopd.training.assembly.samples import rows_of

    for name, capability in config.capabilities.items():
        plan.attempt(
            f"capabilities.{name}.data.prepared",
            rows_of,
            capability.data.prepared,
            name,
            capability,
            "clean" in needs(config.method),
        )
    for name, source in config.sources.items():
        for lora in source.lora:
            if not lora.path.exists():
                plan.problems.append(f"sources.{name}.lora: {lora.path}: no LoRA there")
        if source.weights not in (None, "base") and not Path(source.weights).exists():
            plan.problems.append(f"sources.{name}.weights: nothing at {source.weights}")


def _parts(folder: Path) -> str:
    """Which of a pipeline's parts are there; training itself reads no encoder."""
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    named = [key for key, value in index.items() if isinstance(value, list) and value and value[0]]
    there = [part for part in named if (Path(folder) / part).is_dir()]
    missing = [part for part in named if part not in there]
    needed = [part for part in missing if not part.startswith(PREPARATION)]
    line = f"model: {folder}, a {index['_class_name']} with {', '.join(there)}"
    if needed:
        line += f"; missing: {', '.join(needed)}"
    spare = [part for part in missing if part not in needed]
    return line + (f"; not there, and needed by `danceopd data prepare` alone: {', '.join(spare)}" if spare else "")


def _own_transformer(config: Config, name: str, backbone, transformer: nn.Module | None, attempt) -> nn.Module | None:
    """A source's own transformer without values; None, and a problem, where its weights cannot be used."""
    from danceopd.models.precision import PRECISIONS

    key, weights, dtype = f"sources.{name}.weights", config.sources[name].weights, PRECISIONS[config.training.precision]
    if not is_file_name(weights):
        attempt(key, check_weights, weights)
        return attempt(key, meta_transformer, weights, backbone, dtype)
    if transformer is not None:
        attempt(key, check_transformer_file, weights, transformer)
        return meta_transformer(config.model, backbone, dtype)


def _add_networks(config: Config, plan: Plan, networks: list[nn.Module], how: str) -> None:
    """Sources with weights of their own: on the device, or in host memory but for two blocks of one of them."""
    if not networks:
        return
    total, parameters = sum(map(nbytes, networks)), sum(map(count, networks))
    text = f"{parameters:,} x {how}"
    if not config.training.offload_sources:
        plan.memory["sources of their own weights"] = total, text
        return
    plan.host["sources of their own weights"] = total, text
    plan.memory["sources, streamed"] = max(map(_streamed, networks)), "two blocks of one, and what lies outside blocks"


def _streamed(network: nn.Module) -> int:
    """Bytes on the device while a network's blocks are streamed to it: the two largest, and all that is no block."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    blocks = sorted((nbytes(block) for child in lists for block in child), reverse=True)
    return nbytes(network) - sum(blocks[2:])
