"""Finds out what a run takes and what it lacks, without loading a weight: `danceopd train --dry-run`.

Networks are built on the meta device from their configurations; of files only configurations, headers, LoRAs, prepared
rows and both ends of the encoders' files are read, and of a source's own weights a few matrices. What the backward
keeps is seen on a forward there, through the code that trains.
"""

import os
from collections.abc import Callable, Iterator

import torch
from danceopd_kernels.fp8 import multiplies_codes

from danceopd.config.sections import Config
from danceopd.planning.counts import evaluations_per_step, grid_evaluations, operator_lines
from danceopd.planning.memory import LEFT, Findings
from danceopd.planning.swapping import settle
from danceopd.support.cards import Card
from danceopd.support.devices import find_device
from danceopd.support.errors import UserError
from danceopd.support.files import check_writable
from danceopd.support.memory import format_bytes, free_bytes
from danceopd.support.optimizers import adamw_class
from danceopd.support.trackers import check_trackers
from danceopd.training.assembly.room import CHECKS, check_precisions
from danceopd.training.checkpoints import load_newest

Examine = Callable[[Config, Findings, torch.device | None], None]


def dry_run(config: Config, examine: Examine, card: Card | None = None) -> Findings:
    """Finds out all that a run takes and all that it lacks; nothing is written.

    Args:
        config: The run's configuration.
        examine: `examine(config, findings, device)` fills in what concerns networks and data: planning.models.examine
            for a diffusers model, world.dry_run.examine for the embedded network.
        card: The card that ``auto`` is to fit, if not this machine's.

    Returns:
        What was found; what is wrong stands in its `problems`.
    """
    return _chosen(config, examine, card)[1]


def with_memory_chosen(config: Config, examine: Examine, overwrite: bool = False) -> Config:
    """Chooses ``training.base_precision`` and ``training.swap_blocks`` where they are ``auto``, for this machine.

    Args:
        config: The run's configuration.
        examine: As for `dry_run`.
        overwrite: Whether another run in its folder is started again; if not, it keeps the precision it began with.

    Returns:
        The configuration with what was chosen; as it is where something is missing, which the training's start says.
    """
    if config.training.base_precision == "auto" and not overwrite:
        config = as_it_began(config) or config
    training = config.training
    if "auto" not in (training.base_precision, training.swap_blocks):
        return config
    one, findings = _chosen(config, examine)
    if findings.problems:
        return config
    chosen = {"base_precision": one.training.base_precision}
    lines = [findings.precision] if findings.precision else []
    if training.swap_blocks == "auto":
        swap = findings.swap
        chosen["swap_blocks"] = swap.count if swap else None
        line = swap.line() if swap else "no block has to wait in host memory"
        lines.append(f"training.swap_blocks: auto is {chosen['swap_blocks'] or 'none'}: {line}")
    if int(os.environ.get("RANK", "0")) == 0 and lines:
        print("\n".join(lines))
    return _with(config, **chosen)


def as_it_began(config: Config) -> Config | None:
    """Takes the base's precision from the checkpoint in the run's folder, with which alone it can go on.

    Args:
        config: The run's configuration.

    Returns:
        The configuration with that precision; None where there is no checkpoint.
    """
    checkpoint, _ = load_newest(config.training.output_dir / "checkpoints")
    if checkpoint is None:
        return None
    return _with(config, base_precision=checkpoint.rest["identity"]["training"].get("base_precision"))


def _chosen(config: Config, examine: Examine, card: Card | None = None) -> tuple[Config, Findings]:
    """Makes the dry run of the first precision of the base that fits the card; of the smallest where none does."""
    training, device = config.training, None
    try:
        device = find_device(training.device)
    except UserError:
        pass  # which the dry run itself says
    memory = card.memory if card else None
    if card is None and device is not None and device.type != "cpu":
        memory = free_bytes(device)
    if training.base_precision != "auto":
        return config, _dry_run(config, examine, memory)
    tried = []
    for precision in _precisions(card, device) if memory is not None else (None,):
        one = _with(config, base_precision=precision)
        findings = _dry_run(one, examine, memory)
        size = findings.total_memory() + LEFT + (findings.swap.spared if findings.swap else 0)
        tried.append((size, precision or training.precision, one, findings))
        if fits := memory is None or size <= memory:
            break
    _, name, one, findings = tried[-1] if fits else min(tried, key=lambda each: each[0])
    sizes = ", ".join(f"{each} needs {format_bytes(size)}" for size, each, *_ in tried)
    room = "" if memory is None else f"; {sizes}, of {format_bytes(memory)}"
    findings.precision = f"training.base_precision: auto is {name}{room}"
    return one, findings


def _precisions(card: Card | None, device: torch.device | None) -> Iterator[str | None]:
    """Yields the base's precisions from the best on: of 8 bits FP8 where it is multiplied, else int8, if it works."""
    yield None
    multiplies = card.fp8 is not None if card else multiplies_codes(device)
    for precision in ("fp8", "int8") if multiplies else ("int8", "fp8"):
        try:
            CHECKS[precision](None if card else device)
        except UserError:
            continue
        yield precision
        break
    yield "nf4"


def _with(config: Config, **changes) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def _dry_run(config: Config, examine: Examine, memory: float | None) -> Findings:
    findings, training = Findings(), config.training
    device = findings.attempt("training.device", find_device, training.device)
    check_precisions(config, device, findings.attempt)
    findings.attempt("training.output_dir", check_writable, training.output_dir)
    findings.attempt("training.optimizer", adamw_class, training.optimizer)
    findings.attempt("training.trackers", check_trackers, training.trackers)
    examine(config, findings, device)
    settle(config, findings, memory)
    findings.found += operator_lines(config)
    findings.evaluations = evaluations_per_step(config, findings.sigmas)
    findings.grid = grid_evaluations(config) if training.sample_every else None
    return findings
