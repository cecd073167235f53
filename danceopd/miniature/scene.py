"""Describes what a picture of the miniature's world holds, and draws it."""

from dataclasses import dataclass

import torch

from danceopd.miniature.looks import BOX, EMPTY, IMAGE_SIZE, PLACES, SIZES, background_rgb, sprites, tone_rgb
from danceopd.world.scene import Columns
from danceopd.world.sprites import NATURAL

GAP = 1  # pixels that are free between two boxes

LATTICE = 8  # pixels: a thing begins at a multiple, half a token, so that a small network has few offsets to learn


@dataclass
class Scene(Columns):
    """A batch of B pictures; all tensors are int64.

    background [B], tone [B], style [B]; things, paints, sizes [B, 4]; centres [B, 4, 2] (y, x) in pixels. An unused
    place has `things == EMPTY`.
    """

    background: torch.Tensor
    tone: torch.Tensor
    style: torch.Tensor
    things: torch.Tensor
    paints: torch.Tensor
    sizes: torch.Tensor
    centres: torch.Tensor

    @property
    def occupied(self) -> torch.Tensor:
        """[B, 4] bool."""
        return self.things != EMPTY


def blank(n: int) -> Scene:
    """Makes n empty pictures: photos on snow in the natural tone."""
    zeros = torch.zeros(n, dtype=torch.int64)
    places = torch.zeros(n, PLACES, dtype=torch.int64)
    return Scene(
        background=zeros.clone(),
        tone=zeros.clone(),
        style=zeros.clone(),
        things=torch.full((n, PLACES), EMPTY),
        paints=torch.full((n, PLACES), NATURAL),
        sizes=places.clone(),
        centres=torch.full((n, PLACES, 2), IMAGE_SIZE // 2),
    )


def corner(centres: torch.Tensor) -> torch.Tensor:
    """Returns the first row and column of a sprite's box, which may lie outside: centres' shape."""
    return centres - BOX // 2


def render(scene: Scene) -> torch.Tensor:
    """Draws the pictures of scenes: [B, 3, 64, 64] float32 in [-1, 1]. A later place covers an earlier one."""
    n, side = len(scene), IMAGE_SIZE + 2 * BOX  # a margin, so that a sprite's empty border may lie outside
    canvas = background_rgb()[scene.background].view(n, 3, 1, 1).expand(n, 3, side, side).clone()
    table, reach = sprites(), torch.arange(BOX)
    for k in range(PLACES):
        row = scene.occupied[:, k].nonzero()[:, 0]
        if not len(row):
            continue
        rgba = table[scene.things[row, k], scene.paints[row, k], scene.style[row], scene.sizes[row, k]]
        top, left = (corner(scene.centres[row, k]) + BOX).unbind(-1)
        at = (
            row[:, None, None, None],
            torch.arange(3)[None, :, None, None],
            (top[:, None] + reach)[:, None, :, None],
            (left[:, None] + reach)[:, None, None, :],
        )
        canvas[at] = rgba[:, :3] + (1 - rgba[:, 3:]) * canvas[at]
    picture = canvas[:, :, BOX : BOX + IMAGE_SIZE, BOX : BOX + IMAGE_SIZE] * tone_rgb()[scene.tone].view(n, 3, 1, 1)
    return picture * 2 - 1


def free(sizes: torch.Tensor, centres: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Tells which pictures have no two things that touch, and none that leaves the picture.

    Args:
        sizes: [B, 4] indices into SIZES.
        centres: [B, 4, 2].
        taken: [B, 4] bool, the places that count.

    Returns:
        [B] bool.
    """
    side = torch.tensor(SIZES)[sizes]
    start = centres - side[..., None] // 2
    inside = ((start >= 0) & (start + side[..., None] <= IMAGE_SIZE)).all(-1) | ~taken
    apart = torch.ones(len(sizes), dtype=torch.bool)
    for a in range(PLACES):
        for b in range(a):
            room = torch.maximum(
                start[:, a] - start[:, b] - side[:, b, None], start[:, b] - start[:, a] - side[:, a, None]
            )
            apart &= (room >= GAP).any(-1) | ~taken[:, a] | ~taken[:, b]
    return apart & inside.all(-1)


def put(scene: Scene, moving: torch.Tensor, generator: torch.Generator, accept=None) -> None:
    """Draws places for some of the things, in the scene itself, until no two touch.

    Args:
        scene: Its centres are written; its sizes may shrink where there is no room.
        moving: [B, 4] bool: what gets a new place; the rest stays where it is.
        generator: Draws all.
        accept: (scene, [rows] int64) -> [rows] bool: a further condition on the pictures drawn.
    """
    left, tries = moving.any(-1).nonzero()[:, 0], 0
    while len(left):
        part = scene[left]
        where = torch.rand(part.centres.shape, generator=generator)
        part.centres = torch.where(moving[left, :, None], on_lattice(part.sizes, where), part.centres)
        good = free(part.sizes, part.centres, part.occupied)
        if accept is not None:
            good &= accept(part, left)
        scene.centres[left[good]] = part.centres[good]
        left, tries = left[~good], tries + 1
        if tries % 50 == 0:
            scene.sizes[left] = torch.where(moving[left], (scene.sizes[left] - 1).clamp(min=0), scene.sizes[left])
        if tries > 2000:
            raise RuntimeError(f"{len(left)} pictures have no room for what they should hold")


def on_lattice(sizes: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Returns centres of things that lie inside the picture and begin on the lattice.

    Args:
        sizes: Indices into SIZES, of any shape.
        where: The share of the way from the first place to the last, in [0, 1): sizes' shape + [2], or + [1].
    """
    side = torch.tensor(SIZES)[sizes][..., None]
    places = (IMAGE_SIZE - side) // LATTICE + 1
    return LATTICE * (where * places).long() + side // 2
