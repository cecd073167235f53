"""What a checkpoint keeps beside the large tensors, and which of a configuration must stay the same to go on."""

import inspect

from danceopd.config.sections import Config
from danceopd.core.methods import METHODS
from danceopd.support.errors import UserError
from danceopd.training.checkpoints import Checkpoint

NOT_IDENTITY = (
    "max_steps",
    "output_dir",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "sample_every",
    "device",
    "gradient_accumulation_steps",
    "rollout_batch_size",
    "gradient_checkpointing",
    "offload_sources",
    "shard_sources",
    "rollout_on",
    "cuda_graphs",
    "compile",
    "attention_backend",
    "profile_steps",
)


def identity(config: Config) -> dict:
    """Takes the part of a configuration that a resumed run must share.

    Args:
        config: The run's.

    Returns:
        Its values, without what may change.
    """
    values = config.to_dict()
    values.pop("evaluation")
    values["training"] = {k: v for k, v in values["training"].items() if k not in NOT_IDENTITY}
    return values


def state_of(trainer) -> dict:
    """Collects what a checkpoint keeps beside the large tensors.

    Args:
        trainer: The run's `Trainer`.

    Returns:
        Small tensors and plain values.
    """
    return {
        "step": trainer.step,
        "engine": trainer.engine.rest(),
        "health": trainer.health.state_dict(),
        "errors": trainer.errors.state_dict(),
        "method": trainer.method.state_dict() if inspect.isclass(METHODS[trainer.config.method]) else {},
        "evaluations": dict(trainer.evaluations),
        "seconds": trainer.seconds,
        "skipped": [trainer.skipped, trainer.skipped_in_a_row],
        "identity": identity(trainer.config),
    }


def go_on(trainer, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's state into a `Trainer`.

    Args:
        trainer: The run's `Trainer`, before its first update.
        checkpoint: The checkpoint.

    Raises:
        UserError: For a checkpoint of another configuration; it names the keys that differ.
    """
    state, config = checkpoint.rest, trainer.config
    saved, ours = _given(state["identity"]), _given(identity(config))
    if saved != ours:
        raise UserError(
            f"{config.training.output_dir} holds a run with another configuration "
            f"({', '.join(_differences(saved, ours))}); choose another training.output_dir, or give --overwrite to "
            "start again there"
        )
    trainer.engine.load(checkpoint)
    trainer.health.load_state_dict(state["health"])
    trainer.errors.load_state_dict(state["errors"])
    if state["method"]:
        trainer.method.load_state_dict(state["method"])
    trainer.evaluations.update(state["evaluations"])
    trainer.step, trainer.seconds = state["step"], state["seconds"]
    trainer.skipped, trainer.skipped_in_a_row = state["skipped"]


def _given(values: dict) -> dict:
    """Leaves out keys that hold nothing: a run goes on after a version that has more of them."""
    kept = {key: _given(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None and value != [] and value != {}}


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lists the keys that two configurations disagree on."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key}")
    return changed
