"""Compares a run's configuration with the one that a checkpoint was made by."""

NOT_IDENTITY = (
    "max_steps",
    "output_dir",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "sample_every",
    "device",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "offload_sources",
    "shard_sources",
    "rollout_on",
    "cuda_graphs",
    "compile",
    "attention_backend",
    "profile_steps",
)


def _without_nothing(values: dict) -> dict:
    """Without keys that hold nothing: a run goes on after a version that has more of them."""
    kept = {key: _without_nothing(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None and value != [] and value != {}}


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """The keys that two configurations disagree on."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key}")
    return changed
