"""Draws the objects of the picture world: emoji sprites, their tints, their styles, as ready-made cells."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("dog", "cat", "car", "apple", "airplane", "boat", "clock", "cup")

COLORS = ("natural", "red", "green", "blue", "yellow", "purple")

STYLES = ("photo", "sketch")

BACKGROUNDS = ("snow", "sand", "sky", "night")

EMPTY = len(CLASSES)  # the class index of a cell with no object

NATURAL = 0

SPRITE_SIZE = 14

CELL_SIZE = 16

GRID = 2

IMAGE_SIZE = CELL_SIZE * GRID

JITTER = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))

TINTS = {
    "red": (0.90, 0.10, 0.12),
    "green": (0.10, 0.66, 0.20),
    "blue": (0.14, 0.32, 0.95),
    "yellow": (0.98, 0.84, 0.08),
    "purple": (0.62, 0.16, 0.78),
}

_BACKGROUND_RGB = ((0.96, 0.97, 0.98), (0.86, 0.76, 0.58), (0.60, 0.82, 0.94), (0.12, 0.14, 0.28))

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

SHEET = Path(__file__).parent / "assets" / "sprites.png"


def background_rgb() -> torch.Tensor:
    """Returns the colour of each background: [backgrounds, 3] float32 in [0, 1]."""
    return torch.tensor(_BACKGROUND_RGB)


def tinted(rgb: np.ndarray, color: tuple[float, float, float]) -> np.ndarray:
    """Recolours a sprite [H, W, 3] but keeps its shading: dark stays darker, highlights stay lighter."""
    tint = np.array(color, dtype=np.float32)
    luma = (rgb @ _LUMA)[..., None]
    dark = tint * (0.25 + 1.1 * luma)
    light = tint + (1 - tint) * (luma - 0.7) / 0.6
    return np.clip(np.where(luma > 0.7, np.maximum(dark, light), dark), 0, 1)


def edges(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Returns how much of a line, contour or inner edge, each pixel of a sprite holds: [H, W] in [0, 1]."""
    shape = np.pad(alpha, 1)
    luma = np.pad(rgb @ _LUMA, 1, mode="edge")
    inside = np.minimum.reduce([shape[:-2, 1:-1], shape[2:, 1:-1], shape[1:-1, :-2], shape[1:-1, 2:]])
    contour = alpha * (1 - inside)
    step = np.abs(luma[2:, 1:-1] - luma[:-2, 1:-1]) + np.abs(luma[1:-1, 2:] - luma[1:-1, :-2])
    return np.clip(np.maximum(contour * 1.5, step * 1.2 * inside), 0, 1)


def _sketch(rgb: np.ndarray, alpha: np.ndarray, color: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws white paper cut to the object's shape, with its contour and inner edges in the object's colour."""
    ink = np.array(TINTS.get(color, (0.15, 0.15, 0.15)), dtype=np.float32)
    lines = edges(rgb, alpha)[..., None]
    return (1 - lines) + lines * ink, alpha


@lru_cache(maxsize=1)
def cells() -> torch.Tensor:
    """Draws every object as a ready cell: [classes + 1, colors, styles, jitters, 4, 16, 16] float32 in [0, 1].

    The four channels are premultiplied red, green, blue, and alpha; the last class is the empty cell.
    """
    sheet = np.asarray(Image.open(SHEET).convert("RGBA"), dtype=np.float32) / 255
    table = np.zeros(
        (len(CLASSES) + 1, len(COLORS), len(STYLES), len(JITTER), 4, CELL_SIZE, CELL_SIZE), dtype=np.float32
    )
    for c in range(len(CLASSES)):
        sprite = sheet[:, c * SPRITE_SIZE : (c + 1) * SPRITE_SIZE]
        alpha = sprite[..., 3]
        for k, color in enumerate(COLORS):
            photo = (tinted(sprite[..., :3], TINTS[color]) if color in TINTS else sprite[..., :3], alpha)
            for s, (rgb, a) in enumerate((photo, _sketch(sprite[..., :3], alpha, color))):
                rgba = np.concatenate([rgb * a[..., None], a[..., None]], axis=-1).transpose(2, 0, 1)
                for j, (dy, dx) in enumerate(JITTER):
                    top, left = 1 + dy, 1 + dx
                    table[c, k, s, j, :, top : top + SPRITE_SIZE, left : left + SPRITE_SIZE] = rgba
    return torch.from_numpy(table)
