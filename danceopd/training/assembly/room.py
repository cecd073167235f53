"""Checks the folder of a run and the room on its disk."""

import shutil
import tempfile
from pathlib import Path

from danceopd.support.errors import UserError


def _check_folder(folder: Path) -> None:
    """Fail now, not after an hour: the folder can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # of a name that no other rank has
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another output_dir") from None


def check_room(folder: Path, parameters: int, checkpoints: int) -> None:
    """The disk has room for what a run writes: so many checkpoints more, and the student.

    parameters: that are trained; each has its value, its average and two states of its optimizer. Raises UserError.
    """
    free, needed = shutil.disk_usage(folder).free, 16 * parameters * checkpoints + 4 * parameters + 2**24
    if free < needed:
        raise UserError(
            f"training.output_dir: {free / 2**20:,.0f} MiB are free at {folder}, but {checkpoints} checkpoints and the "
            f"student need {needed / 2**20:,.0f}; make room, or keep fewer (training.keep_checkpoints)"
        )
