"""Encodings kept on disk: named by what they are made of, in safetensors shards, checked when they are read.

A shard's header holds the name and checksum of each entry, so a folder of shards needs no index beside it: a shard is
there whole or not at all, and what a killed run had written is found again.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.texts import parse_json

ENTRIES = "entries"  # key of a shard's header


def key_of(*parts: str | bytes) -> str:
    """Names an entry by everything that its tensors depend on: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Returns a digest of an entry's names, shapes, dtypes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """Returns the name of a tensor with values that are not finite, which training could not recover from."""
    return next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None)


class Cache:
    """Entries of named tensors in a folder. Several processes may read, and each may write shards of its own.

    Args:
        folder: Where the shards are; it need not be there yet.

    Raises:
        UserError: The folder cannot be used.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.damaged: list[str] = []  # shards that could not be opened; their entries are made again
        self._where: dict[str, tuple[Path, str, list[str]]] = {}  # entry -> shard, checksum, names of its tensors
        self._open: dict[Path, object] = {}
        self._verified: set[str] = set()
        if self.folder.is_file():
            raise UserError(f"{self.folder} is a file; give a folder for the cache")
        for path in sorted(self.folder.glob("*.safetensors")):
            self._add(path)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def write(self, entries: dict[str, dict[str, torch.Tensor]]) -> Path:
        """Writes entries as one shard, atomically; its name is made of theirs."""
        header = {key: [checksum(tensors), sorted(tensors)] for key, tensors in entries.items()}
        path = self.folder / f"{key_of(*sorted(entries), str(os.getpid()))}.safetensors"
        flat = {f"{key}/{name}": t.contiguous() for key, tensors in entries.items() for name, t in tensors.items()}
        try:
            write_atomic(path, save(flat, {ENTRIES: json.dumps(header)}))
        except OSError as error:
            raise UserError(f"cannot write to the cache {self.folder}: {error.strerror or error}") from None
        self._add(path)
        return path

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """Reads the tensors of an entry; its checksum is compared when it is read for the first time.

        Raises:
            KeyError: There is no such entry.
            UserError: It is damaged.
        """
        path, expected, names = self._where[key]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            tensors = {name: self._open[path].get_tensor(f"{key}/{name}") for name in names}
        except (SafetensorError, OSError) as error:
            raise self._damage(key, path, str(error)) from None
        if key not in self._verified:
            if checksum(tensors) != expected:
                raise self._damage(key, path, "its checksum differs")
            if lost := not_finite(tensors):
                raise self._damage(key, path, f"its {lost} holds values that are not finite")
            self._verified.add(key)
        return tensors

    def sound(self, key: str) -> bool:
        """Returns whether an entry is there and whole; a shard that is not is removed, with all of its entries."""
        if key not in self._where:
            return False
        try:
            self.read(key)
        except UserError:
            path = self._where[key][0]
            self._where = {k: where for k, where in self._where.items() if where[0] != path}
            self._open.pop(path, None)
            path.unlink(missing_ok=True)
            self.damaged.append(path.name)
            return False
        return True

    def names(self, key: str) -> list[str]:
        """Returns the names of an entry's tensors; a KeyError if there is no such entry."""
        return self._where[key][2]

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                header, there = parse_json(file.metadata()[ENTRIES]), set(file.keys())
            alike: dict[tuple, list[str]] = {}  # most entries have tensors of the same names: one list for all
            entries = {
                key: (path, value, alike.setdefault(tuple(names), names)) for key, (value, names) in header.items()
            }
            for key, (_, value, names) in entries.items():
                if not isinstance(value, str) or not there.issuperset(f"{key}/{name}" for name in names):
                    raise ValueError(f"{key} is not as it is written")
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError):
            self.damaged.append(path.name)
            return
        self._where |= entries

    def _damage(self, key: str, path: Path, reason: str) -> UserError:
        return UserError(f"entry {key} of {path} is damaged ({reason}); run `danceopd data prepare` again to mend it")
