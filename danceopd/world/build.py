"""Puts a run of the embedded network together before its first step; everything that is missing is listed at once."""

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from danceopd.config.expressions import texts_by_route
from danceopd.config.sections import Capability, Config
from danceopd.core.fields import Field
from danceopd.core.methods import needs
from danceopd.models.fp8 import to_fp8
from danceopd.models.twins import without_values
from danceopd.support.errors import UserError
from danceopd.support.ranks import ALONE, Ranks
from danceopd.training.assembly.parts import Parts, Problems, averaged_student
from danceopd.training.assembly.room import check_machine
from danceopd.training.checkpoints import Checkpoint
from danceopd.world.data import WorldData
from danceopd.world.dit import DiT
from danceopd.world.files import load_model, resolve_weights, save_model
from danceopd.world.own_data import ManifestData
from danceopd.world.sampling import check_texts, embedded_samples
from danceopd.world.scoring import make_sampler, score_gedit, score_geneval
from danceopd.world.teachers import source_fields
from danceopd.world.tokenizer import tokenize
from danceopd.world.weight_merge import weight_merge


def build(config: Config, ranks: Ranks = ALONE, settings: dict | None = None) -> Parts:
    """Loads the student, the sources and the data of a run on the embedded network.

    Args:
        config: The configuration, without a `model`.
        ranks, settings: Taken as `training.assembly.build.build_model` takes them; each rank holds all of this.

    Returns:
        The parts of the run.

    Raises:
        UserError: Lists every file, row or device that is missing or does not fit.
    """
    problems = Problems()
    attempt = problems.attempt
    device = check_machine(config, attempt)
    load = cache(load_network)  # sources of the same weights are one network
    networks = {
        name: attempt(f"sources.{name}.weights", load, source.weights) for name, source in config.networks().items()
    }
    student = attempt("student.init_from", start_network, config, networks)
    image_size = student.config.image_size if student else 32
    for name, network in networks.items():
        if network and student and network.config != student.config:
            problems.append(
                f"sources.{name}.weights: its network {network.config} is not the student's {student.config}"
            )
    with_clean = "clean" in needs(config.method)
    data = [
        attempt(f"capabilities.{name}.data", load_data, name, capability, image_size, with_clean)
        for name, capability in config.capabilities.items()
    ]
    said = texts_by_route(config)
    for (name, _), rows, own in zip(config.capabilities.items(), data, said, strict=True):
        if rows is not None:
            attempt(f"capabilities.{name}.data", check_texts, rows, own)
    problems.stop()
    empty_prompt = tokenize([""], student.config.text_length)[0].to(device)
    if config.training.base_precision == "fp8":
        narrow = cache(lambda network: to_fp8(network, device))
        networks = {name: narrow(network) for name, network in networks.items()}
    make = source_fields(config, {name: n.to(device).requires_grad_(False) for name, n in networks.items()})
    fields = [attempt(f"sources.{c.source}", make, c.source) for c in config.capabilities.values()]
    problems.stop()
    anchor = copy.deepcopy(student).to(device).requires_grad_(False) if "anchor" in needs(config.method) else None
    samples = embedded_samples(data, student.config.text_length, image_size, said)
    without, sampler = without_values(student), make_sampler(config, student.config, device)

    def save(checkpoint: Checkpoint, folder: Path) -> None:
        save_model(averaged_student(without, checkpoint), folder / "student.safetensors")

    def score(field: Field) -> dict[str, float]:
        seed, pictures = config.evaluation.seed + 7, config.evaluation.quick
        return {
            "geneval_overall": score_geneval(field, sampler, seed, pictures)["overall"],
            "gedit_average": score_gedit(field, sampler, seed, pictures)["average"],
        }

    return Parts(student.to(device), fields, samples, anchor, empty_prompt, device, save, score=score)


def start_network(config: Config, networks: Mapping[str, DiT | None]) -> DiT | None:
    """Makes the network that the student begins as.

    Args:
        config: The run's.
        networks: Those of its sources; None for one that cannot be loaded.

    Returns:
        The network; None for a mean of which a part is missing.

    Raises:
        UserError: Networks of different sizes have no mean.
    """
    if config.student.init_from != "merge":
        return load_network(config.student.init_from)
    there = [network for network in networks.values() if network]
    if any(network.config != there[0].config for network in there):
        raise UserError("the sources differ in size, so that they have no mean; begin as one of them")
    return weight_merge(there) if len(there) == len(networks) else None


def load_network(weights: str) -> DiT:
    """Loads an embedded network by its name or its file."""
    return load_model(resolve_weights(weights))


def load_data(name: str, capability: Capability, image_size: int, with_clean: bool) -> WorldData | ManifestData:
    """Reads the rows of a capability.

    Args:
        name: The capability's key in the configuration.
        capability: Its section there.
        image_size: Sides of the network's pictures in pixels.
        with_clean: Whether the method learns from finished pictures.

    Raises:
        UserError: The rows do not fit the capability's task or the method.
    """
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
