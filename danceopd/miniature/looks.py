"""Draws the objects of the miniature's world: each class in each size, paint and style, as ready sprites."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from danceopd.world.sprites import COLORS, TINTS, edges, tinted

CLASSES = (
    *("dog", "cat", "car", "apple", "airplane", "boat", "clock", "cup"),
    *("banana", "umbrella", "elephant", "pizza", "broccoli", "bus", "chair", "donut"),
)

LETTERS = ("A", "K", "O", "S", "X", "E")

THINGS = CLASSES + LETTERS  # what a picture can hold: objects, then tiles with a letter

EMPTY = len(THINGS)  # the index of a place with nothing in it

MATERIALS = ("wood", "brick", "ice")

PAINTS = COLORS + MATERIALS

STYLES = ("photo", "sketch", "mosaic", "silhouette", "neon")

SIZES = (18, 22, 28)  # longest sides in pixels

BOX = SIZES[-1]  # of a sprite's tensor; smaller sprites lie in its middle

BACKGROUNDS = ("snow", "sand", "sky", "night", "grass", "rose")

TONES = ("natural", "warm", "cold", "dark")

# What a LoRA of one look is called by, and what it makes of a picture: a column of its scene, and the value there.
LOOKS = {
    "night": ("background", BACKGROUNDS.index("night")),
    "wood": ("paints", PAINTS.index("wood")),
    "warm": ("tone", TONES.index("warm")),
    "silhouette": ("style", STYLES.index("silhouette")),
    "sand": ("background", BACKGROUNDS.index("sand")),
    "ice": ("paints", PAINTS.index("ice")),
    "cold": ("tone", TONES.index("cold")),
    "sketch": ("style", STYLES.index("sketch")),
}

IMAGE_SIZE = 64

PLACES = 4  # the most things that one picture holds

SHEET = Path(__file__).parent / "assets" / "things.png"

_BACKGROUND_RGB = (
    *((0.96, 0.97, 0.98), (0.86, 0.76, 0.58), (0.60, 0.82, 0.94)),
    *((0.12, 0.14, 0.28), (0.50, 0.72, 0.42), (0.94, 0.66, 0.76)),
)

_TONE_RGB = ((1.0, 1.0, 1.0), (1.0, 0.72, 0.42), (0.50, 0.76, 1.0), (0.45, 0.45, 0.45))

_PAINT_RGB = TINTS | {
    "wood": (0.64, 0.43, 0.22),
    "brick": (0.70, 0.28, 0.20),
    "ice": (0.72, 0.92, 1.00),
}


def background_rgb() -> torch.Tensor:
    """Returns the colour of each background: [backgrounds, 3] float32 in [0, 1]."""
    return torch.tensor(_BACKGROUND_RGB)


def tone_rgb() -> torch.Tensor:
    """Returns the factors of each tone: [tones, 3] float32."""
    return torch.tensor(_TONE_RGB)


def _grain(material: str, side: int) -> np.ndarray:
    """Returns a material's pattern [side, side, 3], which multiplies its colour."""
    y, x = np.mgrid[:side, :side]
    if material == "wood":
        value = np.where(y % 4 == 0, 0.55, 1.0)
    elif material == "brick":
        mortar = (y % 5 == 0) | ((x + 4 * (y // 5 % 2)) % 8 == 0)
        value = np.where(mortar, 1.5, 0.9)
    else:
        value = np.select([(x + y) % 6 == 0, (x + y) % 6 == 3], [1.25, 0.7], 1.0)
    return np.repeat(value[..., None], 3, axis=-1).astype(np.float32)


def _painted(rgb: np.ndarray, paint: str) -> np.ndarray:
    """Returns a sprite [H, W, 3] in a colour or made of a material."""
    if paint == "natural":
        return rgb
    painted = tinted(rgb, _PAINT_RGB[paint])
    return np.clip(painted * _grain(paint, len(rgb)), 0, 1) if paint in MATERIALS else painted


def _styled(rgb: np.ndarray, alpha: np.ndarray, paint: str, style: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a sprite's colours [H, W, 3] and its alpha [H, W] in a style."""
    if style == "photo":
        return _painted(rgb, paint), alpha
    if style == "mosaic":
        painted = _painted(rgb, paint) * alpha[..., None]
        side = -(-len(rgb) // 4) * 4
        pad = [(0, side - len(rgb))] * 2
        blocks = [np.pad(a, pad + [(0, 0)] * (a.ndim - 2)) for a in (painted, alpha)]
        blocks = [a.reshape(side // 4, 4, side // 4, 4, -1).mean((1, 3)) for a in blocks]
        color = blocks[0] / np.maximum(blocks[1], 1e-3)
        full = [np.repeat(np.repeat(a, 4, 0), 4, 1)[: len(rgb), : len(rgb)] for a in (color, blocks[1] > 0.4)]
        return np.clip(full[0], 0, 1), full[1][..., 0].astype(np.float32)
    lines = edges(rgb, alpha)[..., None]
    if style == "sketch":
        ink = np.array(_PAINT_RGB.get(paint, (0.15, 0.15, 0.15)), dtype=np.float32)
        return (1 - lines) + lines * ink, alpha
    if style == "silhouette":
        ink = np.array(_PAINT_RGB.get(paint, (0.04, 0.04, 0.06)), dtype=np.float32)
        return np.broadcast_to(ink, rgb.shape).copy(), alpha
    light = np.array(_PAINT_RGB.get(paint, (0.20, 1.00, 0.90)), dtype=np.float32)
    light = light / light.max()
    return (1 - lines) * np.array((0.05, 0.04, 0.10), dtype=np.float32) + lines * light, alpha


@lru_cache(maxsize=1)
def sprites() -> torch.Tensor:
    """Draws everything: [things + 1, paints, styles, sizes, 4, 28, 28] float32 in [0, 1].

    The four channels are premultiplied red, green, blue, and alpha; the last thing is nothing.
    """
    sheet = np.asarray(Image.open(SHEET).convert("RGBA"), dtype=np.float32) / 255
    shape = (len(THINGS) + 1, len(PAINTS), len(STYLES), len(SIZES), 4, BOX, BOX)
    table = np.zeros(shape, dtype=np.float32)
    for t in range(len(THINGS)):
        top = 0
        for z, size in enumerate(SIZES):
            sprite, corner = sheet[top : top + size, t * BOX : t * BOX + size], (BOX - size) // 2
            top += size
            inner = slice(corner, corner + size)
            for p, paint in enumerate(PAINTS):
                for s, style in enumerate(STYLES):
                    rgb, alpha = _styled(sprite[..., :3], sprite[..., 3], paint, style)
                    rgba = np.concatenate([rgb * alpha[..., None], alpha[..., None]], axis=-1)
                    table[t, p, s, z, :, inner, inner] = rgba.transpose(2, 0, 1)
    return torch.from_numpy(table)
