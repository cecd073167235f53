"""Recognises the encoders of a pipeline's folder by their files."""

import hashlib
from pathlib import Path

from danceopd.support.errors import UserError

PROBED = 2**20  # bytes of each weight file that its fingerprint reads at both ends


def fingerprint(folder: Path) -> str:
    """Names a component's files: configurations whole, of weights the size and both ends. Moving it changes nothing."""
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError(f"no files in {folder}; give the folder of a whole pipeline")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(PROBED))
            if size > PROBED:
                file.seek(max(PROBED, size - PROBED))
                digest.update(file.read(PROBED))
    return digest.hexdigest()
