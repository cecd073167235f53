"""What a checkpoint keeps beside the large tensors, and which of a configuration must stay the same to go on.

A run is what its configuration says and what the files hold that it names, wherever they lie: a checkpoint keeps the
digest of each. Files may be moved; where one of another content has its place, the run does not go on.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

from danceopd.config.sections import Config
from danceopd.core.methods import METHODS
from danceopd.data.manifest import read_manifest
from danceopd.models.fingerprint import sample
from danceopd.models.loading import transformer_folder
from danceopd.support.errors import UserError
from danceopd.support.texts import parse_object
from danceopd.training.assembly.parts import Scored
from danceopd.training.checkpoints import Checkpoint

# Of `training`, what may change between a run and its resumption; paths may too, all of `evaluation`, and
# `allow_distilled_base`.
MAY_CHANGE = (
    # how far it goes, and how fast it learns
    "max_steps",
    "max_network_evaluations",
    "learning_rate",
    "lr_schedule",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_nonfinite_steps",
    # where it writes, and how often
    "output_dir",
    "log_every",
    "trackers",
    "save_every",
    "keep_checkpoints",
    "sample_every",
    "profile_steps",
    # where and in which pieces it computes
    "device",
    "gradient_accumulation_steps",
    "rollout_batch_size",
    "gradient_checkpointing",
    "offload_sources",
    "swap_blocks",
    "shard_sources",
    "rollout_on",
    "cuda_graphs",
    "compile",
    "attention_backend",
)


def identity(config: Config) -> dict:
    """Takes the part of a configuration that a resumed run must share.

    Args:
        config: The run's.

    Returns:
        Its values, without what may change and without paths; "contents" holds the digests of what these name.
    """
    values, contents = config.to_dict(), {}
    values.pop("evaluation")
    values.pop("allow_distilled_base")
    values["training"] = {k: v for k, v in values["training"].items() if k not in MAY_CHANGE}
    for keys, digest in _contents(config):
        place = values
        for key in keys[:-1]:
            place = place[key]
        place.pop(keys[-1])
        contents[".".join(map(str, keys))] = digest
    for capability in values["capabilities"].values():
        capability["data"].pop("root", None)
    return {**values, "contents": contents}


def paths_of(config: Config) -> Iterator[tuple[tuple, Path]]:
    """Yields each file or folder that a configuration names for its content: (its keys, its path)."""
    if config.model:
        yield ("model",), config.model
    for name, source in config.sources.items():
        if source.weights and _is_path(config, source.weights):
            yield ("sources", name, "weights"), Path(source.weights)
        for i, lora in enumerate(source.lora):
            yield ("sources", name, "lora", i, "path"), lora.path
    if not config.model and _is_path(config, config.student.init_from):
        yield ("student", "init_from"), Path(config.student.init_from)
    for name, capability in config.capabilities.items():
        for key in ("prepared", "manifest"):
            if path := getattr(capability.data, key):
                yield ("capabilities", name, "data", key), path


def _is_path(config: Config, weights: str) -> bool:
    """Returns whether weights are a file or folder, and no network's name."""
    return weights != "base" if config.model else Path(weights).suffix == ".safetensors"


def _contents(config: Config) -> Iterator[tuple[tuple, str]]:
    """Yields (keys, digest) of what a configuration names."""
    known: dict[tuple, str] = {}
    for keys, path in paths_of(config):
        kind, root = keys[-1], None
        if kind == "manifest":
            root = config.capabilities[keys[1]].data.root
        if (kind, path, root) not in known:
            known[kind, path, root] = _digest(kind, path, root)
        yield keys, known[kind, path, root]


def _digest(kind: str, path: Path, root: Path | None) -> str:
    if kind in ("model", "weights") and path.is_dir():  # of a pipeline training reads no encoder
        parts = {transformer_folder(path), *((path / "scheduler",) if kind == "model" else ())}
        return _joined(sample(part) for part in sorted(parts))
    if kind == "prepared" and path.is_file():  # its entries are named by their content; its head names the model's path
        digest = hashlib.blake2b(digest_size=16)
        with open(path, "rb") as file:
            head = file.readline().removesuffix(b"\n")
            while part := file.read(2**20):
                digest.update(part)
        try:
            values = {key: value for key, value in parse_object(head).items() if key not in ("model", "made_with")}
            head = json.dumps(values, sort_keys=True)
        except ValueError:
            head = str(head)
        return _joined((head, digest.hexdigest()))
    if kind == "manifest" and path.is_file():
        rows, _ = read_manifest(path, root)
        pictures = sorted({picture for row in rows for picture in (*row.source_images, row.target_image) if picture})
        return _joined((sample(path), *map(sample, pictures)))
    return sample(path)


def _joined(parts) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


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
        "scores": trainer.scores,
        "skipped": [trainer.skipped, trainer.skipped_in_a_row],
        "identity": trainer.identity,
    }


def scores_of(state: dict) -> list[Scored]:
    """Returns the scores that a checkpoint's state keeps; older ones have none, or do not say when they were."""
    return [(0, 0, score) if isinstance(score, dict) else tuple(score) for score in state.get("scores", [])]


def go_on(trainer, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's state into a `Trainer`.

    Args:
        trainer: The run's `Trainer`, before its first update.
        checkpoint: The checkpoint.

    Raises:
        UserError: For a checkpoint of another configuration, or of other files; it names the keys that differ.
    """
    state, folder = checkpoint.rest, trainer.config.training.output_dir
    saved, ours = _given(state["identity"]), _given(trainer.identity)
    changed = [key for key in _differences(saved, ours) if not key.startswith("contents")]
    other = _differences(saved.get("contents", {}), ours.get("contents", {}))
    if changed:
        raise UserError(
            f"{folder} holds a run with another configuration ({', '.join(changed)}); choose another "
            "training.output_dir, or give --overwrite to start again there. Of a run that goes on, paths, `evaluation` "
            f"and these keys of `training` may change: {', '.join(MAY_CHANGE)}"
        )
    if other:
        paths = {".".join(map(str, keys)): path for keys, path in paths_of(trainer.config)}
        raise UserError(
            f"{folder} holds a run that began with other files: "
            + ", ".join(f"{key} ({paths.get(key, 'gone')}) has another content" for key in other)
            + "; give the files that it began with, wherever they lie, choose another training.output_dir, or give "
            "--overwrite to start again there"
        )
    trainer.engine.load(checkpoint)
    trainer.health.load_state_dict(state["health"])
    trainer.errors.load_state_dict(state["errors"])
    if state["method"]:
        trainer.method.load_state_dict(state["method"])
    trainer.evaluations.update(state["evaluations"])
    trainer.step, trainer.seconds = state["step"], state["seconds"]
    trainer.skipped, trainer.skipped_in_a_row = state["skipped"]
    trainer.scores = scores_of(state)


def _given(values: dict) -> dict:
    """Leaves out keys that hold nothing: a run goes on after a version that has more of them."""
    kept = {key: _given(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None and value != [] and value != {}}


def _differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lists the keys that two configurations disagree on."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict | None) and isinstance(b, dict | None):
            changed += _differences(a or {}, b or {}, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key}")
    return changed
