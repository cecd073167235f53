"""Examines the networks and the prepared rows of a diffusers model's run without loading a network."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

from danceopd.config.sections import Config
from danceopd.core.conditioning import Conditioning
from danceopd.core.methods import needs
from danceopd.data.sampler import Samples
from danceopd.models.backbones import backbone_of, meta_transformer, pipeline_class_of
from danceopd.models.blocks import blocks, main_blocks
from danceopd.models.fp8 import to_fp8
from danceopd.models.loading import (
    check_transformer_file,
    check_weights,
    hub_id,
    is_file_name,
    parts_of,
    pipeline_index,
    transformer_folder,
    weight_files,
)
from danceopd.models.lora_algebra import squared_norms, sum_loras
from danceopd.models.lora_files import FILES as LORAS
from danceopd.models.lora_files import load_lora, lora_file, lora_parameters, trained_for
from danceopd.models.precision import PRECISIONS
from danceopd.models.shared_base import SharedBase
from danceopd.models.students import FullStudent, LoraStudent
from danceopd.models.tensor_files import TAIL, ends_in_zeros
from danceopd.models.weights import RELATED, likeness, of_folder, shapes_of
from danceopd.planning.backward import conditioning_bytes, held_in_forward, held_in_update, operations
from danceopd.planning.memory import (
    BASE,
    FLOAT,
    Findings,
    add_activations,
    add_questions,
    add_student,
    count,
    nbytes,
    rows_at_once,
    rows_matched,
)
from danceopd.planning.remembered import Remembered
from danceopd.support.errors import UserError
from danceopd.support.hub import near
from danceopd.support.texts import many
from danceopd.training.assembly.bases import distilled_bases
from danceopd.training.assembly.build import run_attention
from danceopd.training.assembly.networks import start_folder, student_layers, student_sizes
from danceopd.training.assembly.samples import check_decoder, model_samples, rows_of
from danceopd.training.assembly.sources import check_embedded, narrow, needs_base, source_folder, sources_on_base
from danceopd.training.assembly.starts import check_alike, start_lora

ENCODERS = ("text_encoder", "tokenizer", "processor", "image_encoder", "feature_extractor", "siglip")


def examine(config: Config, findings: Findings, device: torch.device | None) -> None:
    """Adds to the findings what the networks and the prepared rows of a model's run take and lack.

    Args:
        config: The configuration; its `model` names the pipeline's folder.
        findings: What is found is added to it, as far as the files allow.
        device: Where the run will compute, None where it is not there.
    """
    attempt = findings.attempt
    backbone = attempt("model", backbone_of, config.model)
    if backbone is None:
        _check_files(config, findings)
        return
    findings.warnings += distilled_bases(config, backbone)
    samples = model_samples(config, backbone, attempt)
    findings.found.append(_parts(config.model))
    if device:
        attends = attempt("training.attention_backend", run_attention, config, backbone, device)
        findings.found += [f"attention backend: {attends}"] if attends else []
    for m, (name, capability) in enumerate(config.capabilities.items()) if samples else ():
        rows = sum(map(len, {id(group.data[m]): group.data[m] for group in samples.groups}.values()))
        findings.found.append(f"{name}: {many(rows, 'row')} in {capability.data.prepared}")
        findings.found += [f"{name}: {note}" for note in samples.groups[0].data[m].notes()]
    findings.found += samples.never_drawn if samples else ()
    findings.sigmas = samples.groups[0].sigmas if samples else None
    transformer = attempt("model", meta_transformer, config.model, backbone, PRECISIONS[config.training.precision])
    if needs_base(config) or config.student.init_from == "base":
        attempt("model", check_weights, config.model, transformer)
        _warn_of_ends(findings, "model", partial(weight_files, config.model))
    attempt("training.sample_every", check_decoder, config)
    parameters, networks = _sources(config, findings, backbone, transformer)
    if transformer is None:
        return
    _add_frozen(config, findings, transformer, parameters, networks)
    student = _student(config, findings, backbone, transformer)
    if student is None:
        return
    add_student(config, findings, student)
    if samples is not None:
        _add_forward(config, findings, student, samples)


def _sources(
    config: Config, findings: Findings, backbone: ModuleType, transformer: nn.Module | None
) -> tuple[dict[str, int | None], dict[str, nn.Module | None]]:
    """Checks the files of each source.

    Returns:
        The number of parameters of each source beside the base, None where a file is of no use; and the empty
        transformer of each source with weights of its own.
    """
    attempt, sources, networks = findings.attempt, {}, {}
    for name, source in config.networks().items():
        carrier = transformer  # of the source's adapters
        if name not in sources_on_base(config):
            carrier = networks[name] = _own_transformer(config, name, backbone, transformer, findings)
        pipeline_class = pipeline_class_of(config.model)
        files = [
            carrier and attempt(f"sources.{name}.lora", lora_parameters, lora.path, carrier, pipeline_class)
            for lora in source.lora
        ]
        if carrier is not None:
            attempt(f"sources.{name}.embedded_guidance", check_embedded, carrier, source.embedded_guidance)
        if name in networks:
            sources[name] = carrier and count(carrier)  # adapters are merged into it
        else:
            sources[name] = None if None in files else sum(parameters for parameters, _ in files)
        for lora, result in zip(source.lora, files, strict=True):
            if result:
                findings.found.append(f"{name}: {lora.path}, {result[1]}, all keys fit")
                _warn_of_ends(findings, f"sources.{name}.lora", lambda path=lora.path: [lora_file(path)])
                base, own = trained_for(lora.path), hub_id(config.model)
                if base and own and "/" in base and base != own and name not in networks:
                    findings.warnings.append(
                        f"sources.{name}.lora: {lora.path} says that it was trained on {base}, and the model is {own}; "
                        "it fits by shape, and may look otherwise on these weights"
                    )
    for name, source in config.sources.items():
        if source.guided and source.guided.skip_layers:
            network = networks.get(source.guided.source, transformer)
            key, layers = f"sources.{name}.guided.skip_layers", source.guided.skip_layers.layers
            if network is not None:
                attempt(key, main_blocks, network, layers)
    return sources, networks


def _add_frozen(
    config: Config,
    findings: Findings,
    transformer: nn.Module,
    parameters: dict[str, int | None],
    networks: dict[str, nn.Module | None],
) -> None:
    """Adds the frozen networks: the base, the adapters on it, and the transformers of the other sources."""
    dtype, precision = PRECISIONS[config.training.precision], config.training.base_precision
    size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
    if needs_base(config):
        findings.parameters["base"] = count(transformer)
    findings.parameters |= {f"source {source}, beside the base": n for source, n in parameters.items() if n is not None}
    how, base, own_weights = f"{size} bytes, {name}", count(transformer), [n for n in networks.values() if n]
    own = sum(map(count, own_weights))
    if precision and not any(problem.startswith("training.base_precision") for problem in findings.problems):
        how = f"{'0.53 bytes' if precision == 'nf4' else '1 byte'} in the blocks' linear layers, {size} elsewhere"
        with Remembered():
            for network in (transformer, *own_weights):
                if precision == "fp8":
                    to_fp8(network)
                narrow(config, network)
    if needs_base(config):
        findings.memory[BASE] = nbytes(transformer), f"{base:,} x {how}, shared"
        if config.training.swap_blocks:
            findings.blocks = [nbytes(block) for block in blocks(transformer)]
    total = sum(n for source, n in parameters.items() if n and source not in networks)
    findings.memory["sources beside the base"] = total * size, f"{total:,} x {size} bytes, {name}"
    if not own_weights:
        return
    total = sum(map(nbytes, own_weights))
    how = f"{own:,} x {how}"
    if config.training.offload_sources:
        findings.host["sources of their own weights"] = total, how
        streamed = max(map(_streamed, own_weights))
        findings.memory["sources, streamed"] = streamed, "two blocks of one, and what lies outside blocks"
    else:
        findings.memory["sources of their own weights"] = total, how


def _add_forward(config: Config, findings: Findings, student: nn.Module, samples: Samples) -> None:
    """Adds what forwards of the student keep and hold, at the largest picture size of the prepared rows."""
    dtype = PRECISIONS[config.training.precision]
    autocast = None
    if not config.student.lora and dtype != torch.float32:
        autocast, n, name = dtype, count(student), str(dtype).removeprefix("torch.")
        findings.memory[f"student in {name}"] = (
            n * dtype.itemsize,
            f"{n:,} x {dtype.itemsize} bytes, of a forward by autocast",
        )
    group = max(samples.groups, key=lambda g: sum(map(math.prod, (g.shape, *g.source_shapes))))
    findings.pixels = max(math.prod(row["size"]) for rows in group.data for row in rows.rows)
    conditionings, activations, together, seen = {}, [], [], []
    grows = config.student.lora is None and config.training.gradient_accumulation_steps == 1
    for name, rows in zip(config.capabilities, group.data, strict=True):
        conditioning = findings.attempt(f"capabilities.{name}.data", samples.condition, rows, [0], [False])
        if conditioning is None:
            return
        conditionings[name] = conditioning
    for name, conditioning in sorted(conditionings.items(), key=lambda item: -conditioning_bytes(item[1])):
        if any(_same(conditioning, other) for other in seen):
            continue
        asked = student, group.shape, conditioning
        held = partial(held_in_update, *asked, rows_matched(config), autocast)
        forward = partial(held_in_forward, *asked, rows_at_once(config), autocast)
        # Where all is smaller than of another capability, it is only seen that the transformer takes it.
        less = any(_within(conditioning, other) for other in seen)
        seen.append(conditioning)
        found = findings.attempt(
            f"capabilities.{name}.data",
            lambda held=held, forward=forward, less=less: (
                *((0, 0) if less else (held(False), held(True))),
                forward(),
            ),
        )
        if found is None:
            return
        activations.append(found)
        if less:
            continue
        if grows:
            together.append((held(False, first=True), held(True, first=True)))
    most = (max(sizes) for sizes in zip(*activations, strict=True))
    both = tuple(max(sizes) for sizes in zip(*together, strict=True)) if grows else None
    add_activations(config, findings, *most, together=both)
    latents, samples = FLOAT * math.prod(group.shape), config.training.batch_size
    add_questions(config, findings, latents)
    inputs = samples * (latents + max(map(conditioning_bytes, conditionings.values())))
    findings.operations = lambda: {name: operations(student, group.shape, c) for name, c in conditionings.items()}
    findings.memory["latents, prompts, sources"] = (
        inputs,
        f"{many(samples, 'sample')} of the largest picture size, as prepared",
    )


def _same(one: Conditioning, other: Conditioning) -> bool:
    """Tells whether forwards of two samples are alike: each holds all that the other holds."""
    return _within(one, other) and _within(other, one)


def _within(less: Conditioning, more: Conditioning) -> bool:
    """Tells whether a sample is conditioned on nothing that another has no more of: by shapes, and by lengths."""
    prompts, prompt_form = tree_flatten(less.prompt)
    others, other_form = tree_flatten(more.prompt)
    if prompt_form != other_form or (less.has_source is None) != (more.has_source is None):
        return False
    pictures, more_pictures = (tree_leaves(c.source) if c.source is not None else [] for c in (less, more))
    pairs = [*zip(prompts, others, strict=True), *zip(pictures, more_pictures, strict=False)]
    return len(pictures) <= len(more_pictures) and all(_no_more(a, b) for a, b in pairs)


def _no_more(less, more) -> bool:
    """Tells whether embeddings are of the same width as others and no more of them, or a mask is no longer."""
    if not (isinstance(less, torch.Tensor) and isinstance(more, torch.Tensor)):
        return less == more
    fits = less.dtype == more.dtype and less.ndim == more.ndim
    fits = fits and all(a <= b for a, b in zip(less.shape, more.shape, strict=True))
    if less.is_floating_point():
        return fits and less.shape[-1] == more.shape[-1]
    return fits and int(less.sum()) <= int(more.sum())


def _student(config: Config, findings: Findings, backbone: ModuleType, transformer: nn.Module) -> nn.Module | None:
    """Makes the student on the meta device; None where a problem is in its way."""

    def velocity(transformer, latents, sigma, prompt, sources=(), *_, **__):
        return backbone.velocity(transformer, latents, sigma, prompt, sources, 1.0)

    lora = config.student.lora
    own = findings.attempt("student.init_from", _meta_start, config, backbone) if lora is None else transformer
    if own is not None:
        findings.attempt("student.embedded_guidance", check_embedded, own, config.student.embedded_guidance)
    if lora is None:
        return own and FullStudent(own, velocity)
    layers = findings.attempt("student.lora.targets", student_layers, config, backbone, transformer)
    sizes = layers and findings.attempt("student.lora", student_sizes, config, layers)
    if not sizes:
        return None
    _lacking(config, findings, transformer, layers)
    findings.full_rank = max(min(one.in_features, one.out_features) for one in map(transformer.get_submodule, layers))
    if lora.rank > findings.full_rank:
        findings.warnings.append(
            f"student.lora.rank: {lora.rank} is more than any layer has room for; {findings.full_rank} changes each in "
            "full"
        )
    cut = findings.attempt("student.init_from", _cut_layers, config, transformer, layers)
    if cut:
        where = f"to rank {lora.rank} in {many(cut, 'layer')}"
        findings.found.append(f"student: begins as {config.student.init_from}, cut {where}")
    with torch.device("meta"):
        shared = SharedBase(transformer, [], velocity, layers)
        return LoraStudent(shared, layers, lora.rank, lora.alpha or lora.rank, sizes=sizes)


def _lacking(config: Config, findings: Findings, transformer: nn.Module, layers: list[str]) -> None:
    """Says which sources' adapters change layers that the student's does not have, and how much of their change.

    The share is |D in those layers|^2 / |D|^2, of the change D of all weights.
    """
    pipeline_class, own = pipeline_class_of(config.model), set(layers)
    for name in sources_on_base(config):
        source = config.sources[name]
        try:
            if all(own.issuperset(load_lora(x.path, transformer, pipeline_class, 1.0, True)) for x in source.lora):
                continue
            loras = [
                load_lora(x.path, transformer, pipeline_class, x.scale, base=of_folder(config.model))
                for x in source.lora
            ]
        except (UserError, RuntimeError):  # said of the source, where it is a problem
            continue
        norms = squared_norms(sum_loras(loras))
        missing = [layer for layer in norms if layer not in own]
        if not missing:  # a file's fused layers may hold zeros for those
            continue
        share = sum(norms[layer] for layer in missing) / (sum(norms.values()) or 1.0)
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        findings.warnings.append(
            f"sources.{name}: {share:.1%} of its change (squared norm) is in {many(len(missing), 'layer')} that the "
            f"student's adapter lacks ({', '.join(missing[:2])}{more}); the student can only follow it by other "
            "layers: widen student.lora.targets, such as attention+ffn"
        )


def _meta_start(config: Config, backbone: ModuleType) -> nn.Module:
    """Makes the empty transformer that a full student begins as; a UserError if those to be merged differ."""
    parts = {"model": start_folder(config)}
    if config.student.init_from == "merge":
        on_base = sources_on_base(config)
        own = {
            f"source {name}": source_folder(config, s) for name, s in config.networks().items() if name not in on_base
        }
        parts = (parts if on_base else {}) | own
    networks = {name: meta_transformer(folder, backbone, torch.float32) for name, folder in parts.items()}
    (first, start), *others = networks.items()
    for name, network in others:
        check_alike(first, shapes_of(start), name, shapes_of(network))
    return start


def _cut_layers(config: Config, transformer: nn.Module, layers: list[str]) -> int:
    """Counts the layers in which what a LoRA student begins as has a larger rank; a UserError as from start_lora.

    Files whose conversion depends on values say nothing here.
    """
    pipeline_class, loras = pipeline_class_of(config.model), {}
    for name, source in config.networks().items():
        if config.student.init_from not in (name, "merge"):
            continue
        try:
            loras[name] = sum_loras([load_lora(x.path, transformer, pipeline_class, 1.0, True) for x in source.lora])
        except (UserError, RuntimeError):  # said of the source, where it is a problem
            return 0
    sizes = student_sizes(config, layers)
    return sum(len(a) > sizes[name][0] for name, (a, _, _) in start_lora(config, loras, layers).items())


def _check_files(config: Config, findings: Findings) -> None:
    """Notes what is wrong with rows and sources where there is no model that they could be compared with."""
    with_clean = "clean" in needs(config.method)
    for name, capability in config.capabilities.items():
        key, path = f"capabilities.{name}.data.prepared", capability.data.prepared
        findings.attempt(key, rows_of, path, name, capability, with_clean)
    for name, source in config.networks().items():
        for lora in source.lora:
            if not lora.path.exists():
                findings.problems.append(f"sources.{name}.lora: {lora.path}: no LoRA there{near(lora.path)}")
        if source.weights not in (None, "base") and not Path(source.weights).exists():
            findings.problems.append(f"sources.{name}.weights: nothing at {source.weights}")


def _parts(folder: Path) -> str:
    """Says which of a pipeline's parts are there; training itself reads no encoder."""
    index = pipeline_index(folder)
    named = parts_of(index)
    there = [part for part in named if (Path(folder) / part).is_dir()]
    missing = [part for part in named if part not in there]
    needed = [part for part in missing if not part.startswith(ENCODERS)]
    line = f"model: {folder}, a {index['_class_name']} with {', '.join(there)}"
    if needed:
        line += f"; missing: {', '.join(needed)}"
    spare = [part for part in missing if part not in needed]
    return line + (f"; not there, and needed by `danceopd data prepare` alone: {', '.join(spare)}" if spare else "")


def _warn_of_strangers(config: Config, findings: Findings, key: str, weights: Path | str) -> None:
    """Warns of a source's weights that fit the model by shape and have nothing in common with it."""
    try:
        base = of_folder(config.model)
    except UserError:  # said of the model
        return
    try:
        alike = likeness(base, of_folder(weights))
    except UserError as error:  # some of the numbers are not finite
        findings.problems.append(f"{'model' if str(error).startswith(f'{config.model}/') else key}: {error}")
        return
    if alike < RELATED:
        findings.warnings.append(
            f"{key}: {weights} fits {config.model} by shape alone: cosines of its weights with the model's are at most "
            f"{alike:.2f}, where fine-tuned ones have nearly 1; check that it was trained from this model, since a "
            "student near the base follows no other"
        )


def _warn_of_ends(findings: Findings, key: str, files: Callable[[], list[Path]]) -> None:
    """Warns of files that end in zeros alone."""
    try:
        hollow = [file for file in files() if ends_in_zeros(file)]
    except (UserError, OSError):  # said where they are checked
        return
    findings.warnings += [
        f"{key}: {file} ends in {TAIL // 1024} KiB of zeros, as a download that did not end may leave it; compare its "
        "checksum with the published one, or copy it again"
        for file in hollow
    ]


def _own_transformer(
    config: Config, name: str, backbone: ModuleType, transformer: nn.Module | None, findings: Findings
) -> nn.Module | None:
    """Makes a source's own transformer without values; None, and a problem, where its weights cannot be used."""
    key, weights, dtype = f"sources.{name}.weights", config.sources[name].weights, PRECISIONS[config.training.precision]
    attempt = findings.attempt
    lora = next((file for file in LORAS if (Path(weights) / file).is_file()), None)
    if lora and not transformer_folder(weights).is_dir():
        findings.problems.append(f"{key}: {weights} holds a LoRA ({lora}): give it as sources.{name}.lora")
        return None
    if not is_file_name(weights) and not Path(weights).is_dir():
        where = f"there is no folder {weights}; give a transformer's folder or its safetensors file{near(weights)}"
        findings.problems.append(f"{key}: {where}")
        return None
    if not is_file_name(weights):
        network = attempt(key, meta_transformer, weights, backbone, dtype)
        problems = len(findings.problems)
        attempt(key, check_weights, weights, network)
        if network is not None and len(findings.problems) == problems:
            _warn_of_strangers(config, findings, key, weights)
            _warn_of_ends(findings, key, partial(weight_files, weights))
        return network
    if transformer is not None:
        attempt(key, check_transformer_file, weights, transformer)
        _warn_of_ends(findings, key, lambda: [Path(weights)])
        return meta_transformer(config.model, backbone, dtype)


def _streamed(network: nn.Module) -> int:
    """Counts the bytes on the device while blocks are streamed to it: the two largest, and all that is in no block."""
    sizes = sorted(map(nbytes, blocks(network)), reverse=True)
    return nbytes(network) - sum(sizes[2:])
