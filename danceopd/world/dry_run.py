"""Examines the networks and the data of a run on the embedded network without loading a weight."""

import math
from functools import cache, partial

import torch

from danceopd.config.expressions import texts_by_route
from danceopd.config.sections import Config
from danceopd.core.conditioning import Conditioning
from danceopd.core.methods import needs
from danceopd.models.blocks import main_blocks
from danceopd.models.fp8 import to_fp8
from danceopd.planning.backward import held_in_forward, held_in_update, operations
from danceopd.planning.memory import (
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
from danceopd.support.texts import many
from danceopd.world.build import load_data
from danceopd.world.dit import DiT
from danceopd.world.files import read_config, resolve_weights
from danceopd.world.own_data import ManifestData
from danceopd.world.sampling import check_texts


def examine(config: Config, findings: Findings, device: torch.device | None) -> None:
    """Adds to the findings what the networks and the data of a run take and lack.

    Args:
        config: The configuration, without a `model`.
        findings: What is found is added to it, as far as the files allow.
        device: Not looked at: the embedded network runs on any.
    """
    attempt = findings.attempt
    load = cache(empty_network)  # sources of the same weights are one network
    sources = {name: attempt(f"sources.{name}.weights", load, s.weights) for name, s in config.networks().items()}
    start = config.student.init_from
    if start == "merge":
        start = next(iter(config.networks().values())).weights
        findings.found.append(f"student: begins as the mean of {', '.join(sources)}")
    student = attempt("student.init_from", empty_network, start)  # of its own: sources may be narrowed in place
    for name, source in sources.items():
        if source and student and source.config != student.config:
            findings.problems.append(f"sources.{name}.weights: its network {source.config} is not the student's")
    for name, source in config.sources.items():
        if source.guided and source.guided.skip_layers and (network := sources[source.guided.source]):
            key, layers = f"sources.{name}.guided.skip_layers", source.guided.skip_layers.layers
            attempt(key, main_blocks, network, layers)
    size, with_clean = student.config.image_size if student else 32, "clean" in needs(config.method)
    for (name, capability), texts in zip(config.capabilities.items(), texts_by_route(config), strict=True):
        rows = attempt(f"capabilities.{name}.data", load_data, name, capability, size, with_clean)
        if rows is not None:
            findings.found.append(f"{name}: {many(len(rows), 'row')}")
            attempt(f"capabilities.{name}.data", check_texts, rows, texts)
        if isinstance(rows, ManifestData) and student:
            findings.found += [f"{name}: {note}" for note in rows.notes(student.config.text_length)]
    findings.parameters |= {f"source {name}": count(source) for name, source in sources.items() if source}
    networks = set(filter(None, sources.values()))
    total, how = sum(map(count, networks)), "4 bytes, float32"
    bytes_of_sources = FLOAT * total
    if config.training.base_precision == "fp8":
        how = "1 byte in the blocks' linear layers, 4 elsewhere"
        bytes_of_sources = sum(nbytes(to_fp8(network)) for network in networks)
    findings.memory["source weights"] = bytes_of_sources, f"{total:,} x {how}"
    if student is None:
        return
    add_student(config, findings, student)
    tokens = torch.zeros(1, student.config.text_length, dtype=torch.int64)
    edits = any(capability.task == "edit" for capability in config.capabilities.values())
    shape = (3, size, size)
    picture = torch.zeros(1, *shape)
    conditioning = Conditioning(tokens, picture if edits else None, torch.tensor([edits]))
    findings.operations = lambda: {
        name: operations(student, shape, Conditioning(tokens, picture, torch.tensor([c.task == "edit"])))
        for name, c in config.capabilities.items()
    }
    held = partial(held_in_update, student, shape, conditioning, rows_matched(config))
    forward = held_in_forward(student, shape, conditioning, rows_at_once(config))
    together = (held(first=True), None) if config.training.gradient_accumulation_steps == 1 else None
    add_activations(config, findings, held(), None, forward, together)
    add_questions(config, findings, FLOAT * math.prod(shape))


def empty_network(weights: str) -> DiT:
    """Makes an embedded network on the meta device, from the header of its file."""
    with torch.device("meta"):
        return DiT(read_config(resolve_weights(weights)))
