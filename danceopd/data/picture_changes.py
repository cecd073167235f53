"""What preparing changes of a user's pictures, counted and said."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from danceopd.support.pictures import WHITENED
from danceopd.support.texts import some

MUCH = 0.1  # of a picture's area, that is said where it is cut off

CHANGES = {
    "white": "have transparent parts, which become white",
    "cut": f"lose more than {MUCH:.0%} at their sides, to fit the sizes that are trained",
    "enlarged": "are smaller than the size that they are trained at, and are enlarged",
}


def changes_of(picture: Image.Image, size: tuple[int, int]) -> tuple[str, ...]:
    """Finds what changes of a decoded picture that is scaled to cover (height, width) and cut there: of CHANGES."""
    height, width = size
    ratio = picture.height * width / (picture.width * height)
    found = {
        "white": picture.info.get(WHITENED, False),
        "cut": 1 - min(ratio, 1 / ratio) > MUCH,
        "enlarged": max(height / picture.height, width / picture.width) > 1,
    }
    return tuple(name for name, is_so in found.items() if is_so)


def picture_notes(changes: Mapping[Path, tuple[str, ...]]) -> list[str]:
    """Says what changes of pictures, a line for each of CHANGES with the first of their names."""
    lines = []
    for change, text in CHANGES.items():
        if names := [path.name for path, own in changes.items() if change in own]:
            lines.append(f"{len(names)} of {len(changes)} pictures {text}: {some(names)}")
    return lines
