"""Reads a picture back into a scene by matching every cell against every rendering of it: exact, no network."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from danceopd.world.scene import CELLS, Scene
from danceopd.world.sprites import (
    BACKGROUNDS,
    CELL_SIZE,
    CLASSES,
    COLORS,
    EMPTY,
    GRID,
    JITTER,
    STYLES,
    background_rgb,
    cells,
)

CONFIDENCE_THRESHOLD = 0.3  # GenEval's own; here it means a root mean square error below 0.14

_ERROR_AT_ZERO_CONFIDENCE = 0.2


@dataclass
class Detection:
    """What was found in B pictures.

    scene: the best match. style: [B, 4] of each cell (`scene.style` is the majority over objects).
    error: [B, 4] float32, root mean square difference of the cell to its best match, pixels in [0, 1].
    """

    scene: Scene
    style: torch.Tensor
    error: torch.Tensor

    @property
    def confidence(self) -> torch.Tensor:
        """[B, 4] float32 in [0, 1]; 1 is a pixel-exact match."""
        return (1 - self.error / _ERROR_AT_ZERO_CONFIDENCE).clamp(min=0)

    @property
    def found(self) -> torch.Tensor:
        """[B, 4] bool: an object is there, and confidently so."""
        return self.scene.occupied & (self.confidence > CONFIDENCE_THRESHOLD)

    @property
    def clear(self) -> torch.Tensor:
        """[B, 4] bool: the cell is confidently what it was read as, object or empty."""
        return self.confidence > CONFIDENCE_THRESHOLD


@lru_cache(maxsize=1)
def _templates() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns templates [backgrounds, T, 768], their squared norms [backgrounds, T], and labels [T, 4]."""
    table = cells()[:EMPTY].reshape(-1, 4, CELL_SIZE, CELL_SIZE)
    table = torch.cat([table, torch.zeros(1, 4, CELL_SIZE, CELL_SIZE)])  # the empty cell comes last
    paper = background_rgb().view(-1, 1, 3, 1, 1)
    rgb = (table[None, :, :3] + (1 - table[None, :, 3:]) * paper).flatten(2)
    axes = [torch.arange(n) for n in (len(CLASSES), len(COLORS), len(STYLES), len(JITTER))]
    labels = torch.cartesian_prod(*axes)
    labels = torch.cat([labels, torch.tensor([[EMPTY, 0, 0, JITTER.index((0, 0))]])])
    return rgb, rgb.square().sum(-1), labels


@torch.no_grad()
def detect(images: torch.Tensor, chunk: int = 256) -> Detection:
    """Reads pictures [B, 3, 32, 32] in [-1, 1] back into scenes (values outside are clipped, NaN counts as black).

    The background is the one under which the best matches of all four cells leave the least error.
    """
    templates, norms, labels = _templates()
    best_label, best_error, best_background = [], [], []
    for part in images.float().split(chunk):
        pixels = (part.nan_to_num(-1.0).clamp(-1, 1) + 1) / 2
        n = len(pixels)
        patches = pixels.view(n, 3, GRID, CELL_SIZE, GRID, CELL_SIZE).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(n * CELLS, 3 * CELL_SIZE**2)
        energy = patches.square().sum(-1)
        errors, matches = [], []
        for b in range(len(BACKGROUNDS)):
            distance, match = (norms[b] - 2 * patches @ templates[b].T).min(-1)
            errors.append((distance + energy).clamp(min=0).view(n, CELLS) / patches.shape[1])
            matches.append(match.view(n, CELLS))
        errors, matches = torch.stack(errors), torch.stack(matches)
        background = errors.sum(-1).argmin(0)
        row = torch.arange(n)
        best_background.append(background)
        best_error.append(errors[background, row].sqrt())
        best_label.append(labels[matches[background, row]])
    label, error = torch.cat(best_label), torch.cat(best_error)
    style = label[..., 2]
    objects = label[..., 0]
    occupied = objects != EMPTY
    drawn = ((style == 1) & occupied).sum(-1) * 2 > occupied.sum(-1)
    scene = Scene(torch.cat(best_background), drawn.long(), objects, label[..., 1], label[..., 3])
    return Detection(scene, style, error)
