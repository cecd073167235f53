"""Checkpoints of a run: any number of ranks write them, any other number reads them."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from danceopd.models.weights import Weights
from danceopd.support.errors import UserError
from danceopd.support.files import sync
from danceopd.support.ranks import ALONE, Ranks

PATTERN = "step-*"

MANIFEST, REST = "manifest.json", "rest.pt"


def bounds(numel: int, rank: int, size: int) -> tuple[int, int]:
    """Finds a rank's slice of a flattened tensor: ZeRO-3's equal parts, of which the last ones may lack entries.

    Args:
        numel: Number of the tensor's entries.
        rank: The rank.
        size: Number of ranks.

    Returns:
        The first entry, and the one after the last.

    Example:
        >>> [bounds(5, rank, 2) for rank in range(2)]
        [(0, 3), (3, 5)]
    """
    part = math.ceil(numel / size)
    return min(rank * part, numel), min((rank + 1) * part, numel)


# Long: what all ranks do in turn, with one place for what can go wrong in it.
def save_state(
    folder: Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Size],
    rest: dict,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Writes a checkpoint, then removes all but the newest; every rank calls it.

    A checkpoint is a folder step-NNNNNNNN of one safetensors file a rank with its slices of all large tensors, one
    small file with the rest, and a manifest with the checksum of each. It is written beside its place and renamed when
    it is whole, so that a process killed at any moment leaves it there or not at all. (DeepSpeed's own are pickles that
    must be converted before another number of ranks reads them.)

    Args:
        folder: The folder of the run's checkpoints.
        step: Number of updates that are done.
        tensors: This rank's slices (`bounds`), flat, by name.
        shapes: The shapes of the whole tensors, by name.
        rest: Small tensors and plain values, of which rank 0's are written.
        keep: Number of checkpoints that stay.
        ranks: The processes of the run.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: On every rank, where one cannot write (disk full, folder read-only); older checkpoints stay good.
    """
    path, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}.tmp"
    written = {}
    try:
        if ranks.rank == 0:
            for left in folder.glob(".step-*.tmp"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        trouble = None
    except OSError as error:
        trouble = _reason(error)
    trouble = _first(ranks.gather(trouble), ranks)
    if not trouble:
        try:
            name = f"rank-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
            sync(temporary / name)
            written[name] = _checksum(temporary / name)
            if ranks.rank == 0:
                torch.save(rest, temporary / REST)
                sync(temporary / REST)
                written[REST] = _checksum(temporary / REST)
        except (OSError, SafetensorError, RuntimeError) as error:
            trouble = _reason(error)
        everyone = ranks.gather((written, trouble))
        trouble = _first([trouble for _, trouble in everyone], ranks)
        files = {name: value for part, _ in everyone for name, value in part.items()}
    if not trouble and ranks.rank == 0:
        try:
            manifest = {
                "step": step,
                "ranks": ranks.size,
                "files": files,
                "shapes": {name: list(shape) for name, shape in shapes.items()},
            }
            manifest["blake2b"] = _digest(manifest)
            with open(temporary / MANIFEST, "w", encoding="utf-8") as file:
                json.dump(manifest, file)
                file.flush()
                os.fsync(file.fileno())
            sync(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            sync(folder)
        except OSError as error:
            trouble = _reason(error)
    trouble = ranks.from_first(trouble)
    if trouble:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        older = checkpoints(folder)
        good = f"the checkpoint {older[-1]} is still good" if older else "there is no earlier checkpoint"
        raise UserError(
            f"cannot write {path}: {trouble}; {good}. Make room or choose another training.output_dir, then run the "
            "same command again"
        )
    if ranks.rank == 0:
        tidy(folder, path, keep)
    ranks.wait()
    return path


def tidy(folder: Path, newest: Path, keep: int) -> None:
    """Leave `keep` checkpoints of a folder, of which the whole one `newest` is the last, and nothing half written.

    Those after it are damaged, since a run goes on from the last whole one.
    """
    there = checkpoints(folder)
    older = [path for path in there if path <= newest]
    for path in [*older[:-keep], *there[len(older) :], *folder.glob(".step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def _digest(manifest: dict) -> str:
    """Returns the digest of a manifest without its own: two that say the same have the same."""
    said = json.dumps({key: value for key, value in manifest.items() if key != "blake2b"}, sort_keys=True)
    return hashlib.blake2b(said.encode()).hexdigest()


def _first(troubles: list[str | None], ranks: Ranks) -> str | None:
    """Returns the first rank's trouble, with its number where there are several."""
    found = ((rank, trouble) for rank, trouble in enumerate(troubles) if trouble)
    return next((f"rank {rank}: {trouble}" if ranks.size > 1 else trouble for rank, trouble in found), None)


def _reason(error: Exception) -> str:
    """Says in a line what went wrong; torch's writer hides the system's error behind one of its own."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def _checksum(path: Path) -> dict:
    """Works out a file's size and digest."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "blake2b": hashlib.file_digest(file, "blake2b").hexdigest()}


def checkpoints(folder: Path) -> list[Path]:
    """Lists the checkpoints of a folder.

    Args:
        folder: The folder of a run's checkpoints; it may be missing.

    Returns:
        Their folders, oldest first.
    """
    return sorted(path for path in folder.glob(PATTERN) if (path / MANIFEST).is_file())


class Checkpoint:
    """Reads a whole checkpoint on the disk: the rest at once, the large tensors as they are asked for.

    Args:
        path: The checkpoint's folder.
        manifest: What its manifest holds.

    Attributes:
        step: Number of updates that were done.
        ranks: Number of processes that wrote it.
        shapes: The shapes of the large tensors, by name.
        rest: Small tensors and plain values.
    """

    def __init__(self, path: Path, manifest: dict):
        self.path, self.step, self.ranks = path, manifest["step"], manifest["ranks"]
        self.shapes = {name: torch.Size(shape) for name, shape in manifest["shapes"].items()}
        self.rest = torch.load(path / REST, weights_only=True, map_location="cpu")

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Reads a checkpoint that is known to be whole.

        Args:
            path: Its folder.

        Returns:
            The checkpoint.
        """
        return cls(path, json.loads((path / MANIFEST).read_text(encoding="utf-8")))

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Reads a slice of a large tensor, flattened, and no more of the files.

        Args:
            name: The tensor's.
            start: The first entry.
            stop: The one after the last.

        Returns:
            Tensor [stop - start].
        """
        parts = []
        for rank in range(self.ranks):
            first, last = bounds(self.shapes[name].numel(), rank, self.ranks)
            if max(first, start) < min(last, stop):
                with safe_open(self.path / f"rank-{rank:05d}-of-{self.ranks:05d}.safetensors", framework="pt") as file:
                    parts.append(file.get_slice(name)[max(first, start) - first : min(last, stop) - first])
        return torch.cat(parts) if parts else torch.empty(0)

    def optimizer_states(self) -> dict[str, dict[str, str]]:
        """Finds the large tensors that are states of the optimizer.

        Returns:
            {parameter: {key of its optimizer's state: the large tensor's name}}.
        """
        found: dict[str, dict[str, str]] = {}
        for full in self.shapes:
            kind, key, name = (*full.split("/", 2), "")[:3]
            if kind == "optimizer":
                found.setdefault(name, {})[key] = full
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Reads a large tensor, whole.

        Args:
            name: The tensor's.

        Returns:
            The tensor, in its shape.
        """
        shape = self.shapes[name]
        return self.slice(name, 0, shape.numel()).reshape(shape)


def load_newest(folder: Path, ranks: Ranks = ALONE) -> tuple[Checkpoint | None, list[str]]:
    """Reads the newest checkpoint that is whole; the ranks share the checking of its files, and agree.

    Args:
        folder: The folder of the run's checkpoints.
        ranks: The processes of the run.

    Returns:
        The checkpoint, None without any, and a message for each damaged one passed over.

    Raises:
        UserError: If there are checkpoints but none is whole.
    """
    messages: list[str] = []
    for path in reversed(ranks.from_first(checkpoints(folder))):
        manifest, reason = _checked(path, ranks)
        if not reason:
            return Checkpoint(path, manifest), messages
        messages.append(f"{path} is damaged ({reason}); using the one before it")
    if messages:
        raise UserError(
            f"no checkpoint in {folder} can be read; delete them to start again, or restore one:\n  "
            + "\n  ".join(m.split(";")[0] for m in messages)
        )
    return None, messages


def _checked(path: Path, ranks: Ranks) -> tuple[dict, str | None]:
    """Reads the manifest, and finds what is wrong with the checkpoint as all ranks see it."""
    manifest, reason = {}, None
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("blake2b") != _digest(manifest):
            raise ValueError(f"{MANIFEST} has not the content that was written")
        if not manifest["files"]:
            raise ValueError(f"{MANIFEST} names no files")
        for i, (name, expected) in enumerate(sorted(manifest["files"].items())):
            if i % ranks.size == ranks.rank and _checksum(path / name) != expected:
                reason = f"{name} has not the bytes that were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return manifest, next((reason for reason in ranks.gather(reason) if reason), None)


def of_checkpoint(checkpoint: Checkpoint, prefix: str) -> Weights:
    """Takes some of a checkpoint's tensors as weights.

    Args:
        checkpoint: The checkpoint.
        prefix: How their names begin there, and no longer in the weights.

    Returns:
        The weights, which read the files as they are asked for.
    """
    return Weights(
        {n.removeprefix(prefix): shape for n, shape in checkpoint.shapes.items() if n.startswith(prefix)},
        lambda name, start, stop: checkpoint.slice(prefix + name, start, stop),
    )
