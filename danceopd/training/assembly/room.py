"""Checks what every run needs of its machine: a device, a folder, room on the disk, and the libraries it names."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from danceopd.config.sections import Config
from danceopd.models.eight_bit import check_eight_bit
from danceopd.models.fp8 import check_fp8
from danceopd.support.devices import find_device
from danceopd.support.errors import UserError
from danceopd.support.optimizers import adamw_class
from danceopd.support.texts import many

CHECKS = {"fp8": check_fp8, "int8": lambda device: check_eight_bit()}  # of precisions that do not work everywhere


def check_machine(config: Config, attempt: Callable) -> torch.device | None:
    """Finds the device of a run and checks its folder, its optimizer and its precisions.

    Args:
        config: The run's configuration.
        attempt: `attempt(key, function, *args)` calls the function, and notes what a user can mend under the key.

    Returns:
        The device, or None where the one asked for is not there.
    """
    training = config.training
    device = attempt("training.device", find_device, training.device)
    attempt("training.output_dir", check_folder, training.output_dir)
    attempt("training.optimizer", adamw_class, training.optimizer)
    check_precisions(config, device, attempt)
    return device


def check_precisions(config: Config, device: torch.device | None, attempt: Callable) -> None:
    """Checks that a device, and what is installed, can store the base and run rollouts as the run wants it.

    Args:
        config: The run's configuration.
        device: The run's; None where it is not there.
        attempt: As for `check_machine`.
    """
    for key in ("base_precision", "rollout_precision"):
        if check := CHECKS.get(getattr(config.training, key)):
            attempt(f"training.{key}", check, device)


def check_alone(config: Config, settings: dict | None) -> bool:
    """Checks that what runs in one process alone is not asked of DeepSpeed; returns True, or raises UserError."""
    if settings is not None and config.training.swap_blocks:
        raise UserError("blocks wait in host memory in one process alone; leave it out, or start without DeepSpeed")
    return True


def check_folder(folder: Path) -> None:
    """Makes the folder of a run and writes a file into it, so that a run fails now and not after an hour.

    Args:
        folder: The run's training.output_dir.

    Raises:
        UserError: The folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # under a name that no other rank has
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another output_dir") from None


def check_room(folder: Path, parameters: int, checkpoints: int) -> None:
    """Checks that the disk has room for the checkpoints still to be written, and for the student.

    Args:
        folder: The run's folder, which is there.
        parameters: Number of trained parameters; each has its value, its average and two states of its optimizer.
        checkpoints: Number of checkpoints still to be written.

    Raises:
        UserError: There is less room than that.
    """
    free, needed = shutil.disk_usage(folder).free, 16 * parameters * checkpoints + 4 * parameters + 2**24
    if free < needed:
        raise UserError(
            f"training.output_dir: {free / 2**20:,.0f} MiB are free at {folder}, but "
            f"{many(checkpoints, 'checkpoint')} and the student need {needed / 2**20:,.0f}; make room, or keep fewer "
            "(training.keep_checkpoints)"
        )
