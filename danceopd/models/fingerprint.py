"""Recognises model files by their content, wherever they lie."""

import hashlib
import os
from pathlib import Path

from danceopd.support.errors import UserError
from danceopd.support.paths import near_path

WHOLE = 2**26  # bytes of a file up to which its sample is all of it

BLOCKS, BLOCK = 64, 2**16  # of a larger file's sample beside both ends: how many, and bytes of each

PROBED = 2**20  # bytes of each weight file that a folder's fingerprint reads at both ends


def fingerprint(path: Path) -> str:
    """Names the content of a file or a folder.

    Args:
        path: A file, which is read whole; or a folder, of whose files the names, the sizes and both ends are read:
            configurations are shorter than that, weights are not.

    Returns:
        32 hexadecimal digits.

    Raises:
        UserError: There is no such file or folder, or the folder is empty.
    """
    if not path.exists():
        raise UserError(f"there is nothing at {path}{near_path(path) or '; give the folder or file of a model'}")
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError(f"no files in {path}; give the folder of a whole pipeline, or a file")
    for file in files:
        size = file.stat().st_size
        digest.update(os.fsencode(f"{file.relative_to(path)} {size} "))
        with open(file, "rb") as opened:
            digest.update(opened.read(PROBED))
            if size > PROBED:
                opened.seek(max(PROBED, size - PROBED))
                digest.update(opened.read(PROBED))
    return digest.hexdigest()


def sample(path: Path | str) -> str:
    """Names the content of a file or a folder, of whatever size, within a second or so for each of its files.

    Args:
        path: A file, whose size and bytes are read: all of them up to WHOLE, else both ends (with a safetensors file's
            header) and BLOCKS more, evenly spread. Or a folder, of which all files count by their names within it.

    Returns:
        32 hexadecimal digits; "missing" where nothing is.
    """
    path, digest = Path(path), hashlib.blake2b(digest_size=16)
    if path.is_file():
        _add_sample(digest, path)
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            digest.update(os.fsencode(f"{file.relative_to(path).as_posix()} "))
            _add_sample(digest, file)
    else:
        return "missing"
    return digest.hexdigest()


def identity(path: Path) -> str:
    """Names the content of a file or folder that is there, as `sample` does: also where only its middle was trained.

    Raises:
        UserError: There is no such file or folder, or the folder is empty.
    """
    if not path.exists() or (path.is_dir() and not any(p.is_file() for p in path.rglob("*"))):
        raise UserError(f"there is nothing at {path}; give the folder or file of a model")
    return sample(path)


def _add_sample(digest, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{size} ".encode())
    with open(file, "rb") as opened:
        if size <= WHOLE:
            digest.update(opened.read())
            return
        length = int.from_bytes(opened.read(8), "little") if file.suffix == ".safetensors" else 0
        opened.seek(0)
        digest.update(opened.read(max(PROBED, min(8 + length, WHOLE))))
        for block in range(1, BLOCKS + 1):
            opened.seek(block * (size - BLOCK) // (BLOCKS + 1))
            digest.update(opened.read(BLOCK))
        opened.seek(size - PROBED)
        digest.update(opened.read(PROBED))
