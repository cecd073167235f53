"""Recognises model files by their content, wherever they lie."""

import hashlib
from pathlib import Path

from danceopd.support.errors import UserError

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
        raise UserError(f"there is nothing at {path}; give the folder or file of a model")
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError(f"no files in {path}; give the folder of a whole pipeline, or a file")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size} ".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(PROBED))
            if size > PROBED:
                opened.seek(max(PROBED, size - PROBED))
                digest.update(opened.read(PROBED))
    return digest.hexdigest()
