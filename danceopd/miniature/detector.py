"""Reads a picture back into a scene by matching every look of every thing at every place: exact, no network."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import avg_pool2d, pad, unfold

from danceopd.miniature.looks import (
    BOX,
    EMPTY,
    IMAGE_SIZE,
    PAINTS,
    PLACES,
    SIZES,
    STYLES,
    THINGS,
    TONES,
    background_rgb,
    sprites,
    tone_rgb,
)
from danceopd.miniature.scene import Scene, blank, render

CONFIDENCE_THRESHOLD = 0.3  # GenEval's own; here it means a root mean square error below 0.14

_ERROR_AT_ZERO_CONFIDENCE = 0.2

_LEAST_CONTRAST = 0.31  # of a thing against its background; on less, as much less error is borne

_MARGIN = 6  # how far a box may lie outside: the empty border of the smallest sprite, made even

_GRID = (IMAGE_SIZE + 2 * _MARGIN - BOX) // 2 + 1  # places of a box on a line, two pixels apart

_LEAST_GAIN = 2.0  # squared error that a thing must explain to be looked at; a faint smudge explains less

_RANK = 96  # directions in which the first look compares

_STARTS = 4  # positions from which it then looks closer

_CANDIDATES = 48  # looks and places that are then compared at full resolution


@dataclass
class Detection:
    """What was found in B pictures.

    Attributes:
        scene: The best match; `scene.style` is that of most things.
        style: [B, 4] int64, of each thing.
        error: [B, 4] float32, root mean square difference of each thing to its best match, pixels in [0, 1]; infinity
            where nothing is.
        rest: [B] float32, root mean square difference of the whole picture to the scene's clean rendering.
    """

    scene: Scene
    style: torch.Tensor
    error: torch.Tensor
    rest: torch.Tensor

    @property
    def confidence(self) -> torch.Tensor:
        """[B, 4] float32 in [0, 1]; 1 is a pixel-exact match."""
        return (1 - self.error / _ERROR_AT_ZERO_CONFIDENCE).clamp(min=0)

    @property
    def found(self) -> torch.Tensor:
        """[B, 4] bool: a thing is there, and confidently so."""
        return self.scene.occupied & (self.confidence > CONFIDENCE_THRESHOLD)


@dataclass(frozen=True)
class Templates:
    """What T looks of things add to a background.

    Attributes:
        added: [T, 3, 28, 28].
        support: [T, 28, 28] bool, the pixels that each covers.
        directions: [588, 96], in which the looks at half resolution differ most.
        half: [96, T], the looks at half resolution in these directions.
        half_norms: [T], squared, at half resolution.
        norms: [T], squared, at full resolution.
    """

    added: torch.Tensor
    support: torch.Tensor
    directions: torch.Tensor
    half: torch.Tensor
    half_norms: torch.Tensor
    norms: torch.Tensor


@lru_cache(maxsize=1)
def _labels() -> torch.Tensor:
    """Returns [T, 4]: thing, paint, style and size of each template."""
    return torch.cartesian_prod(*(torch.arange(len(names)) for names in (THINGS, PAINTS, STYLES, SIZES)))


@lru_cache(maxsize=8)
def _templates(background: int) -> Templates:
    """Makes the templates of a background."""
    rgba = sprites()[:EMPTY].reshape(-1, 4, BOX, BOX)
    added = rgba[:, :3] - rgba[:, 3:] * background_rgb()[background].view(3, 1, 1)
    half = avg_pool2d(added, 2).flatten(1)
    directions = torch.linalg.eigh(half.T @ half).eigenvectors[:, -_RANK:]
    return Templates(
        added,
        rgba[:, 3] > 0,
        directions,
        (half @ directions).T.contiguous(),
        half.square().sum(-1),
        added.square().sum((1, 2, 3)),
    )


def _grounds(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns background and tone of pictures [B, 3, 64, 64] in [0, 1], by the colour that most pixels are near."""
    colors = (background_rgb()[:, None] * tone_rgb()[None]).reshape(-1, 3)
    distance = torch.cdist(pixels.flatten(2).mT, colors.expand(len(pixels), -1, -1))
    nearest = distance.argmin(-1)
    near = (distance.amin(-1) < 0.15).float() + 1e-3
    votes = torch.zeros(len(pixels), len(colors)).scatter_add_(1, nearest, near)
    best = votes.argmax(-1)
    return best // len(TONES), best % len(TONES)


@torch.no_grad()
def detect(images: torch.Tensor, chunk: int = 8) -> Detection:
    """Reads pictures [B, 3, 64, 64] in [-1, 1] back into scenes (values outside are clipped, NaN counts as black)."""
    n = len(images)
    pixels = (images.float().nan_to_num(-1.0).clamp(-1, 1) + 1) / 2
    scene = blank(n)
    scene.background, scene.tone = _grounds(pixels)
    style = torch.zeros(n, PLACES, dtype=torch.int64)
    error = torch.full((n, PLACES), float("inf"))
    plain = pixels / tone_rgb()[scene.tone].view(n, 3, 1, 1)
    for background in scene.background.unique().tolist():
        rows = (scene.background == background).nonzero()[:, 0]
        for part in rows.split(chunk):
            found = _read(plain[part] - background_rgb()[background].view(3, 1, 1), background)
            label, centres, errors = found
            scene.things[part], scene.paints[part], style[part], scene.sizes[part] = label.unbind(-1)
            scene.centres[part], error[part] = centres, errors
    scene.things[error > _ERROR_AT_ZERO_CONFIDENCE * (1 - CONFIDENCE_THRESHOLD)] = EMPTY
    occupied = scene.occupied
    counts = torch.stack([((style == s) & occupied).sum(-1) for s in range(len(STYLES))], -1)
    scene.style = counts.argmax(-1)
    rest = (pixels - (render(scene) + 1) / 2).square().mean((1, 2, 3)).sqrt()
    return Detection(scene, style, error, rest)


def _read(residual: torch.Tensor, background: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds things in what pictures [n, 3, 64, 64] add to their background, the one that explains most first.

    Returns:
        Labels [n, 4, 4], centres [n, 4, 2] and errors [n, 4].
    """
    looks = _templates(background)
    n, labels = len(residual), _labels()
    wide = pad(residual, (_MARGIN,) * 4)
    windows = unfold(avg_pool2d(wide, 2), BOX // 2).mT @ looks.directions  # [n, positions, 96], two pixels apart
    # Squared error explained, at full resolution, by the best thing of each size at each position.
    gains = (4 * (2 * windows @ looks.half - looks.half_norms)).unflatten(-1, (-1, len(SIZES))).amax(-2)
    corner = 2 * torch.arange(_GRID)
    grid = torch.cartesian_prod(corner, corner) - _MARGIN + BOX // 2  # centres of the positions
    label = torch.tensor([EMPTY, 0, 0, 0]).repeat(n, PLACES, 1)
    centres = torch.full((n, PLACES, 2), IMAGE_SIZE // 2)
    errors = torch.full((n, PLACES), float("inf"))
    alive = torch.arange(n)
    for place in range(PLACES):
        best, index = gains[alive].flatten(1).topk(_STARTS)
        alive, index = alive[best[:, 0] > _LEAST_GAIN], index[best[:, 0] > _LEAST_GAIN]
        if not len(alive):
            break
        row, at = alive.repeat_interleave(_STARTS), index.flatten() // len(SIZES)
        template = (2 * windows[row, at] @ looks.half - looks.half_norms).topk(_CANDIDATES).indices
        t, centre, gain = _closest(wide[row], looks, template, grid[at])
        first = gain.view(-1, _STARTS).argmax(-1) + _STARTS * torch.arange(len(alive))
        t, centre = t[first], centre[first]
        label[alive, place], centres[alive, place] = labels[t], centre
        errors[alive, place] = _error(wide[alive], looks, t, centre)
        # What overlaps the thing by more than two pixels is the same thing read otherwise.
        apart = (grid[None] - centre[:, None]).abs().amax(-1)[..., None]  # [alive, positions, 1]
        reach = (torch.tensor(SIZES)[labels[t, 3]][:, None, None] + torch.tensor(SIZES)) // 2 - 2
        gains[alive] = torch.where(apart < reach, -1.0, gains[alive])
    return label, centres, errors


def _windows(wide: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Cuts boxes [n, k, 3, 28, 28] around centres [n, k, 2] out of pictures with a margin."""
    reach = torch.arange(BOX)
    start = (centres - BOX // 2 + _MARGIN).clamp(0, wide.shape[-1] - BOX)
    top, left = start.unbind(-1)
    rows, columns = (top[..., None] + reach)[..., :, None], (left[..., None] + reach)[..., None, :]
    return wide[torch.arange(len(wide))[:, None, None, None], :, rows, columns].permute(0, 1, 4, 2, 3)


def _closest(
    wide: torch.Tensor, looks: Templates, template: torch.Tensor, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Finds the look and place that explain most at full resolution, near [n, 2]: the template [n], the centre [n, 2]
    and the squared error explained [n].

    The candidates [n, k] find the place, there all templates are compared, and the best once more finds its place.
    """
    reach = torch.arange(-2, 3)
    shifts, everything = torch.cartesian_prod(reach, reach), looks.added.flatten(1)
    norms, row = looks.norms, torch.arange(len(wide))
    for choice in (template, None):
        centres = at[:, None] + shifts
        windows = _windows(wide, centres).flatten(2)  # [n, 25, 2352]
        if choice is None:
            middle = windows[:, len(shifts) // 2]
            choice = (2 * middle @ everything.T - norms).argmax(-1, keepdim=True)
        gain = 2 * everything[choice] @ windows.mT - norms[choice][..., None]  # [n, k, 25]
        best = gain.flatten(1).argmax(-1)
        at = centres[row, best % len(shifts)]
    return choice[:, 0], at, gain.flatten(1).amax(-1)


def _error(wide: torch.Tensor, looks: Templates, template: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square difference of each picture to a template over the pixels that it covers: [n].

    It counts for more where the template itself differs little from the background: half of it is not there.
    """
    window, added = _windows(wide, centre[:, None])[:, 0], looks.added[template]
    support = looks.support[template]

    def over_support(values: torch.Tensor) -> torch.Tensor:
        return ((values.square().mean(1) * support).sum((-2, -1)) / support.sum((-2, -1))).sqrt()

    return over_support(window - added) * (_LEAST_CONTRAST / over_support(added)).clamp(min=1)
