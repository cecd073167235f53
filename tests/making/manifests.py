"""Manifests and the pictures that they name."""

import json
from pathlib import Path

from PIL import Image


def picture(path: Path, size=(8, 8), color=(255, 0, 0), mode="RGB", **options) -> Path:
    """Writes a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def jsonl(path: Path, records: list) -> Path:
    """Writes a line for each record; a string is written as it is."""
    lines = (item if isinstance(item, str) else json.dumps(item) for item in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def good(**changes) -> dict:
    """A row without mistakes."""
    return {"task": "t2i", "prompt": "a dog", "target_image": "a.png", **changes}
