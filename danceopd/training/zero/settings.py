"""Reads DeepSpeed's configuration."""

import math
from collections.abc import Iterator
from pathlib import Path

from danceopd.config.sections import Config
from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean
from danceopd.support.paths import near_config, shipped_config
from danceopd.support.texts import parse_json, read_text

# What the run's own configuration says, and DeepSpeed's would say a second time.
OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "amp"),
)


# The other sections of DeepSpeed that a run passes on. DeepSpeed itself passes over a section that it does not know.
SECTIONS = (
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio"),
    *("communication_data_type", "gradient_predivide_factor", "prescale_gradients", "sparse_gradients"),
    *("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print"),
    *("tensorboard", "csv_monitor", "wandb", "comet", "disable_allgather", "compile", "data_types"),
)


SIZES = ("reduce_bucket_size", "stage3_max_live_parameters")  # of zero_optimization: what a plan reckons with


def read_deepspeed(path: Path | str) -> dict:
    """Reads a DeepSpeed configuration.

    A value "auto" is taken where the run's own configuration says it, as transformers' users write it.

    Args:
        path: A JSON file, or the name of one that ships, such as configs/deepspeed/zero3.json.

    Returns:
        DeepSpeed's settings.

    Raises:
        UserError: For a file that cannot be read, for a section that is unknown or that the run's own configuration
            says, for a value "auto" that nobody would fill in, and for a zero_optimization of odd types.
    """
    path = shipped_config(Path(path))
    if not path.exists():
        raise UserError(f"cannot read {path}: there is no file {path}{near_config(path)}")
    try:
        found = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a JSON object of DeepSpeed's settings")
    found = {key: value for key, value in found.items() if not (key in OURS and _filled_in(value))}
    if doubled := [key for key in OURS if key in found]:
        raise UserError(f"{path}: leave out {', '.join(doubled)}; the run's own configuration says it")
    if unknown := [key for key in found if key not in SECTIONS]:
        near = did_you_mean(unknown[0], SECTIONS)
        raise UserError(f"{path}: no section {unknown[0]!r} is passed on to DeepSpeed{near}")
    if keys := ", ".join(_automatic(found)):
        raise UserError(f'{path}: "auto" is not filled in for {keys}; give a number, or leave it out')
    zero = found.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f'{path}: zero_optimization must be an object such as {{"stage": 3}}, got {str(zero)[:80]!r}')
    for key in SIZES:
        if key in zero and not _is_size(zero[key]):
            raise UserError(f"{path}: zero_optimization.{key} must be a number of entries, got {str(zero[key])[:80]!r}")
    return found


def _is_size(value: object) -> bool:
    """Tells whether DeepSpeed reads a value as a number of entries: it takes a number as text too."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        return False
    return math.isfinite(number) and number >= 0


def for_ranks(config: Config) -> tuple[Config, list[str]]:
    """Puts AdamW in the place of Muon, which runs in one process: at half of its learning rate.

    Args:
        config: The run's.

    Returns:
        The configuration of a run on several ranks or with DeepSpeed, and lines about what is other in it.

    Raises:
        UserError: Its base_precision is auto.
    """
    training = config.training
    if training.base_precision == "auto":
        raise UserError(
            "training.base_precision: auto looks at the memory of one card, and ranks must agree; give fp8, int8 or "
            "nf4, or leave it out"
        )
    if training.optimizer != "muon":
        return config, []
    rate = training.learning_rate / 2
    changed = training.model_copy(update={"optimizer": "adamw", "learning_rate": rate})
    said = f"muon runs in one process; here adamw takes its place, at half of the learning rate, {rate:g}"
    return config.model_copy(update={"training": changed}), [f"training.optimizer: {said}"]


def _filled_in(value) -> bool:
    """Tells whether a section leaves all that it says to the run's own configuration."""
    if isinstance(value, dict):
        return all(_filled_in(inner) for inner in value.values())
    return value == "auto"


def _automatic(values: dict, prefix: str = "") -> Iterator[str]:
    """Names the keys whose value is "auto"."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _automatic(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
