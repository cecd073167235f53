"""Describes what a picture of the world holds, and draws it."""

from dataclasses import dataclass, fields
from typing import Self

import torch

from danceopd.world.sprites import CELL_SIZE, EMPTY, GRID, IMAGE_SIZE, JITTER, NATURAL, background_rgb, cells

CELLS = GRID * GRID

NO_JITTER = JITTER.index((0, 0))


class Columns:
    """A batch whose fields are tensors with a row for each picture."""

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, index) -> Self:
        """Selects pictures by slice, mask or index tensor."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def clone(self) -> Self:
        """Returns a copy."""
        return type(self)(**{f.name: getattr(self, f.name).clone() for f in fields(self)})


@dataclass
class Scene(Columns):
    """A batch of B pictures. Cells are numbered in reading order; all tensors are int64.

    background [B], style [B]; objects, colors, jitter [B, 4]. An empty cell has `objects == EMPTY`.
    """

    background: torch.Tensor
    style: torch.Tensor
    objects: torch.Tensor
    colors: torch.Tensor
    jitter: torch.Tensor

    @property
    def occupied(self) -> torch.Tensor:
        """[B, 4] bool."""
        return self.objects != EMPTY


def blank(n: int, background: torch.Tensor | None = None) -> Scene:
    """Makes n empty pictures in the photo style, sprites centred; backgrounds as given or all the first."""
    zeros = torch.zeros(n, dtype=torch.int64)
    return Scene(
        background=zeros.clone() if background is None else background.clone(),
        style=zeros,
        objects=torch.full((n, CELLS), EMPTY),
        colors=torch.full((n, CELLS), NATURAL),
        jitter=torch.full((n, CELLS), NO_JITTER),
    )


def render(scene: Scene) -> torch.Tensor:
    """Draws the pictures of scenes: [B, 3, 32, 32] float32 in [-1, 1]."""
    n = len(scene)
    rgba = cells()[scene.objects, scene.colors, scene.style[:, None], scene.jitter]  # [B, 4 cells, 4, 16, 16]
    paper = background_rgb()[scene.background].view(n, 1, 3, 1, 1)
    rgb = rgba[:, :, :3] + (1 - rgba[:, :, 3:]) * paper
    rgb = rgb.view(n, GRID, GRID, 3, CELL_SIZE, CELL_SIZE).permute(0, 3, 1, 4, 2, 5)
    return rgb.reshape(n, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
