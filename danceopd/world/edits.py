"""Draws edit instructions with GEdit-Bench's kinds, the scenes to edit, and the scenes they ask for."""

from dataclasses import dataclass

import torch

from danceopd.world.prompts import colored, describe, draw, draw_canvas, draw_row, groups
from danceopd.world.scene import CELLS, Scene
from danceopd.world.sprites import BACKGROUNDS, CLASSES, COLORS, EMPTY, NATURAL, STYLES

LOCAL_KINDS = ("subject-add", "subject-remove", "subject-replace", "color-alter")

GLOBAL_KINDS = ("background-change", "style-change")

KINDS = LOCAL_KINDS + GLOBAL_KINDS

HELD_OUT_KINDS = ("subject-add", "subject-replace", "color-alter")  # those that can bring in a held-out pair


@dataclass(frozen=True)
class Edit:
    """One instruction. target: the cell that changes, or -1 where any empty cell will do or none is meant."""

    text: str
    kind: str
    target: int


def _allowed_colors(split: str) -> torch.Tensor:
    """Returns [classes, colors] bool: tints of the split."""
    table = torch.zeros(len(CLASSES), len(COLORS), dtype=torch.bool)
    table[tuple(colored(split).T)] = True
    return table


def _edit_groups(split: str) -> torch.Tensor:
    """Returns [N, 3] classes; for held-out edits those whose first and third are a held-out pair."""
    table = groups(split, 3)
    if split == "seen":
        return table
    held_out = {tuple(pair) for pair in groups(split, 2).tolist()}
    return table[[(a, c) in held_out for a, _, c in table.tolist()]]


def _draw_tint(cls: torch.Tensor, split: str, generator: torch.Generator) -> torch.Tensor:
    """Returns a tint of the split for each class index in `cls` (any shape)."""
    weights = _allowed_colors(split)[cls.reshape(-1)].float()
    return torch.multinomial(weights, 1, generator=generator).view(cls.shape)


def sample_edits(
    kinds: torch.Tensor, generator: torch.Generator, *, split: str = "seen"
) -> tuple[list[Edit], Scene, Scene]:
    """Draws one instruction with the scene to edit and the expected scene for each kind.

    A scene to edit holds one to three objects of different classes, each in its natural colour or a tint. The edited
    scene differs from it in nothing but what was asked. With split "held_out" an object added or put in another's place
    makes a held-out pair with the first (or takes the place of one that would), and a colour altered becomes one held
    out for its class.

    Args:
        kinds: [B] int64, indices into KINDS.
        generator: Draws everything.
        split: "seen" or "held_out".

    Returns:
        The edits, the scenes to edit, and the expected scenes.
    """
    n = len(kinds)
    row = torch.arange(n)
    is_kind = {name: kinds == i for i, name in enumerate(KINDS)}
    # The third class is the one that an edit brings in.
    group = draw_row(_edit_groups(split), n, generator)
    size = 1 + draw(n, 3, generator)
    brings = is_kind["subject-add"] | is_kind["subject-replace"]
    size = torch.where(brings, size.clamp(max=2), size)
    order = torch.rand(n, CELLS, generator=generator).argsort(-1)
    tinted = torch.rand(n, 3, generator=generator) < 0.5
    color = torch.where(tinted, _draw_tint(group, split, generator), NATURAL)

    if split == "held_out":  # so that the only held-out tint of a class is there to be asked for
        color[is_kind["color-alter"], 0] = NATURAL
    source = draw_canvas(n, generator)
    source.style = torch.where(is_kind["style-change"], draw(n, len(STYLES), generator), 0)
    for slot in range(3):
        put = slot < size
        at = order[:, slot]
        source.objects[row[put], at[put]] = group[put, slot]
        source.colors[row[put], at[put]] = color[put, slot]

    result = source.clone()
    subject = order[:, 0]  # the first object placed is the one talked about
    new_place = order[row, size]  # for an addition: the first cell left empty
    place = torch.where(is_kind["subject-add"], new_place, subject)
    new_color = _alternative_tint(group[:, 0], color[:, 0], split, generator)
    shift = 1 + draw(n, len(BACKGROUNDS) - 1, generator)
    result.background = torch.where(
        is_kind["background-change"], (source.background + shift) % len(BACKGROUNDS), source.background
    )
    result.style = torch.where(is_kind["style-change"], 1 - source.style, source.style)
    removed = is_kind["subject-remove"]
    result.objects[row[removed], subject[removed]] = EMPTY
    result.colors[row[removed], subject[removed]] = NATURAL
    result.objects[row[brings], place[brings]] = group[brings, 2]
    result.colors[row[brings], place[brings]] = color[brings, 2]
    altered = is_kind["color-alter"]
    result.colors[row[altered], subject[altered]] = new_color[altered]

    columns = (kinds, group[:, 0], group[:, 2], color[:, 2], new_color, result.background, result.style, subject)
    return _instructions(columns), source, result


def _instructions(columns: tuple[torch.Tensor, ...]) -> list[Edit]:
    """Writes the instructions of edits from [B] columns: kind, old class, new class, its tint, the altered colour, the
    new background, the new style, and the cell of the object talked about."""
    edits = []
    for kind, old, new, tint, paint, background, style, cell in zip(*(c.tolist() for c in columns), strict=True):
        name = KINDS[kind]
        text = {
            "subject-add": f"add {describe(new, tint)}",
            "subject-remove": f"remove the {CLASSES[old]}",
            "subject-replace": f"replace the {CLASSES[old]} with {describe(new, tint)}",
            "color-alter": f"make the {CLASSES[old]} {COLORS[paint]}",
            "background-change": f"change the background to {BACKGROUNDS[background]}",
            "style-change": f"turn it into a {STYLES[style]}",
        }[name]
        target = -1 if name == "subject-add" or name in GLOBAL_KINDS else cell
        edits.append(Edit(text, name, target))
    return edits


def _alternative_tint(cls: torch.Tensor, current: torch.Tensor, split: str, generator: torch.Generator) -> torch.Tensor:
    """Returns a tint of the split other than the current colour (of the seen ones where the split has no other)."""
    weights = _allowed_colors(split)[cls]
    weights[torch.arange(len(cls)), current] = False
    empty = ~weights.any(-1)
    weights[empty] = _allowed_colors("seen")[cls[empty]]
    return torch.multinomial(weights.float(), 1, generator=generator)[:, 0]
