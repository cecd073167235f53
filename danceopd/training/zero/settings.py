"""Reads DeepSpeed's configuration."""

import json
from pathlib import Path

from danceopd.support.errors import UserError

# What the run's own configuration says, and DeepSpeed's would say a second time.
OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "amp"),
)


def read_deepspeed(path: Path | str) -> dict:
    """A DeepSpeed configuration. Raises UserError for one that cannot be read or says what the run's own says."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a JSON object of DeepSpeed's settings")
    if doubled := [key for key in OURS if key in found]:
        raise UserError(f"{path}: leave out {', '.join(doubled)}; the run's own configuration says it")
    return found
