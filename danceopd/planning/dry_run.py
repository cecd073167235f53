"""Finds out what a run takes and what it lacks, without loading a weight: `danceopd train --dry-run`.

Networks are built on the meta device from their configurations; of files only configurations, headers, LoRAs, prepared
rows and both ends of the encoders' files are read, and of a source's own weights a few matrices. What the backward
keeps is seen on a forward there, through the code that trains.
"""

import os
from collections.abc import Callable

import torch

from danceopd.config.sections import Config
from danceopd.models.eight_bit import check_eight_bit
from danceopd.models.fp8 import check_fp8
from danceopd.planning.counts import evaluations_per_step, grid_evaluations, operator_lines
from danceopd.planning.memory import Findings
from danceopd.planning.swapping import settle
from danceopd.support.devices import find_device
from danceopd.support.files import check_writable
from danceopd.support.memory import free_bytes
from danceopd.support.optimizers import adamw_class
from danceopd.support.trackers import check_trackers

Examine = Callable[[Config, Findings, torch.device | None], None]


def dry_run(config: Config, examine: Examine, memory: float | None = None) -> Findings:
    """Finds out all that a run takes and all that it lacks; nothing is written.

    Args:
        config: The run's configuration.
        examine: `examine(config, findings, device)` fills in what concerns networks and data: planning.models.examine
            for a diffusers model, world.dry_run.examine for the embedded network.
        memory: Bytes of the card, if not of this machine's, which ``training.swap_blocks: auto`` is to fit.

    Returns:
        What was found; what is wrong stands in its `problems`.
    """
    findings, training = Findings(), config.training
    device = findings.attempt("training.device", find_device, training.device)
    if training.base_precision == "fp8":
        findings.attempt("training.base_precision", check_fp8, device)
    elif training.base_precision == "int8":
        findings.attempt("training.base_precision", check_eight_bit)
    if training.rollout_precision == "fp8":
        findings.attempt("training.rollout_precision", check_fp8, device)
    findings.attempt("training.output_dir", check_writable, training.output_dir)
    findings.attempt("training.optimizer", adamw_class, training.optimizer)
    findings.attempt("training.trackers", check_trackers, training.trackers)
    examine(config, findings, device)
    if memory is None and device is not None and device.type != "cpu":
        memory = free_bytes(device)
    settle(config, findings, memory)
    findings.found += operator_lines(config)
    findings.evaluations = evaluations_per_step(config, findings.sigmas)
    findings.grid = grid_evaluations(config) if training.sample_every else None
    return findings


def with_blocks_chosen(config: Config, examine: Examine) -> Config:
    """Puts a number in the place of ``training.swap_blocks: auto``, by what a dry run finds on this machine.

    Args:
        config: The run's configuration.
        examine: As for `dry_run`.

    Returns:
        The configuration, which trains the same; as it is where it gives a number, or where something is missing, which
        the training's start says.
    """
    if config.training.swap_blocks != "auto":
        return config
    findings = dry_run(config, examine)
    if findings.problems:
        return config
    count = findings.swap.count if findings.swap else None
    line = findings.swap.line() if findings.swap else "no block has to wait in host memory"
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"training.swap_blocks: auto is {count or 'none'}: {line}")
    return config.model_copy(update={"training": config.training.model_copy(update={"swap_blocks": count})})
