"""Checkpoints of a run: atomic to write, verified to read, the newest few kept."""

from pathlib import Path

import torch

from danceopd.checkpoint import new_file
from danceopd.errors import UserError

PATTERN = "step-*.pt"


def save_state(folder: Path, state: dict, keep: int) -> Path:
    """Write `state` (tensors and plain values; state["step"] names it), then remove all but the newest `keep`.

    Raises UserError where the disk is full or the folder read-only; what was there before stays good.
    """
    path = folder / f"step-{state['step']:08d}.pt"
    try:
        with new_file(path) as file:  # not through a buffer: a whole transformer's state fills the memory once
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's writer may hide the first behind the second
        reason = getattr(error, "strerror", None) or error.__context__ or error
        older = checkpoints(folder)
        good = f"the checkpoint {older[-1]} is still good" if older else "there is no earlier checkpoint"
        raise UserError(
            f"cannot write {path}: {reason}; {good}. Make room or choose another "
            "training.output_dir, then run the same command again"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob(PATTERN))


def load_newest(folder: Path) -> tuple[dict | None, list[str]]:
    """The newest checkpoint that is whole (None without any), and a message for each damaged one passed over.

    Raises UserError if there are checkpoints but none is whole.
    """
    messages = []
    for path in reversed(checkpoints(folder)):
        try:
            return torch.load(path, weights_only=True, map_location="cpu"), messages
        except Exception as error:  # a truncated archive fails in many ways, all of which mean the same
            reason = str(error).splitlines()[0]
            messages.append(f"{path} is damaged ({reason}); using the one before it")
    if messages:
        raise UserError(
            f"no checkpoint in {folder} can be read; delete them to start again, or restore one:\n  "
            + "\n  ".join(m.split(";")[0] for m in messages)
        )
    return None, messages
