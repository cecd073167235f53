"""What a run takes and what it lacks, without loading a weight: `danceopd train --dry-run`.

Networks are built on the meta device from their configurations; of files only configurations, headers, prepared
rows and both ends of the encoders' files are read. What the backward keeps is seen on a forward there, through the code
that trains.
"""

import os
from pathlib import Path

from danceopd.config.sections import Config
from danceopd.models.fp8 import check_fp8
from danceopd.planning.counts import evaluations_per_step, grid_evaluations
from danceopd.planning.memory import Plan
from danceopd.planning.models import _model
from danceopd.support.devices import find_device
from danceopd.support.errors import UserError
from danceopd.support.optimizers import adamw_class
from danceopd.world.dry_run import _embedded


def dry_run(config: Config) -> Plan:
    """Find out all that a run takes and all that it lacks; nothing is written."""
    plan = Plan()
    device = plan.attempt("training.device", find_device, config.training.device)
    if config.training.base_precision == "fp8":
        plan.attempt("training.base_precision", check_fp8, device)
    if config.training.rollout_precision == "fp8":
        plan.attempt("training.rollout_precision", check_fp8, device)
    plan.attempt("training.output_dir", _check_folder, config.training.output_dir)
    plan.attempt("training.optimizer", adamw_class, config.training.optimizer)
    if config.model:
        _model(config, plan, device)
    else:
        _embedded(config, plan)
    plan.evaluations = evaluations_per_step(config)
    plan.grid = grid_evaluations(config) if config.training.sample_every else None
    return plan


def _check_folder(folder: Path) -> None:
    """The nearest folder that is there can be written; nothing is made."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write to {there}; choose another output_dir")
