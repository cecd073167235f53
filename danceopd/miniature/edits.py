"""Draws edit instructions with GEdit-Bench's kinds, the scenes to edit, and the scenes they ask for."""

from functools import lru_cache

import torch

from danceopd.miniature.looks import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    EMPTY,
    LETTERS,
    MATERIALS,
    PAINTS,
    PLACES,
    STYLES,
    THINGS,
    TONES,
)
from danceopd.miniature.prompts import allowed_colors, allowed_pairs, canvas, named
from danceopd.miniature.scene import Scene, free, on_lattice, put
from danceopd.world.edits import Edit
from danceopd.world.prompts import draw, draw_row
from danceopd.world.sprites import NATURAL

LOCAL_KINDS = (
    *("subject-add", "subject-remove", "subject-replace", "color-alter"),
    *("material-alter", "motion-change", "text-change"),
)

GLOBAL_KINDS = ("background-change", "tone-transfer", "style-change")

KINDS = LOCAL_KINDS + GLOBAL_KINDS

HELD_OUT_KINDS = ("subject-add", "subject-replace", "color-alter")  # those that can bring in a held-out pair

SIDES = ("left", "right", "top", "bottom")

INSTRUCTIONS = {
    "subject-add": "add {painted}",
    "subject-remove": "remove the {old}",
    "subject-replace": "replace the {old} with {painted}",
    "color-alter": "make the {old} {paint}",
    "material-alter": "make the {old} out of {paint}",
    "motion-change": "move the {old} to the {side}",
    "text-change": "change the letter {old} to {new}",
    "background-change": "change the background to {background}",
    "tone-transfer": "give the picture a {tone} tone",
    "style-change": "turn it into a {style}",
}

ALL = range(len(CLASSES))

HALF = ALL[: len(CLASSES) // 2]  # the classes that the base and the narrow edit source see in edits


@lru_cache
def _triples(split: str, classes: range) -> torch.Tensor:
    """Returns [N, 3] distinct classes whose pairs are seen, but in held-out edits the first and the third are not."""
    inside = torch.zeros(len(CLASSES), dtype=torch.bool)
    inside[list(classes)] = True
    seen, pairs = (allowed_pairs(name) & inside[:, None] & inside[None] for name in ("seen", split))
    return (seen[:, :, None] & seen[None] & pairs[:, None, :]).nonzero()


# Long: everything is drawn in one order, on which the shipped networks' data depend.
def sample_edits(
    kinds: torch.Tensor, generator: torch.Generator, *, split: str = "seen", classes: range = ALL
) -> tuple[list[Edit], Scene, Scene]:
    """Draws one instruction with the scene to edit and the expected scene for each kind.

    A scene to edit holds one to three things of different classes, each in its natural look, in a colour or of a
    material. The edited scene differs from it in nothing but what was asked. With split "held_out" an object added or
    put in another's place makes a held-out pair with the first (or takes the place of one that would), and a colour
    altered becomes one held out for its class.

    Args:
        kinds: [B] int64, indices into KINDS.
        generator: Draws everything.
        split: "seen" or "held_out".
        classes: Those that occur.

    Returns:
        The edits, the scenes to edit, and the expected scenes.
    """
    n = len(kinds)
    row = torch.arange(n)
    is_kind = {name: kinds == i for i, name in enumerate(KINDS)}
    brings = is_kind["subject-add"] | is_kind["subject-replace"]
    # The third class is the one that an edit brings in; the first is the one talked about.
    group = draw_row(_triples(split, classes), n, generator)
    size = 1 + torch.minimum(draw(n, 3, generator), torch.where(brings, 1, 2))
    paints = _draw_paints(group, generator)
    letters = torch.stack([torch.randperm(len(LETTERS), generator=generator)[:2] for _ in range(n)]) + len(CLASSES)
    text = is_kind["text-change"]
    group[text, 0] = letters[text, 0]
    paints[text, 0] = NATURAL
    if split == "held_out":  # so that the only held-out tint of a class is there to be asked for
        paints[is_kind["color-alter"], 0] = NATURAL

    source, slot = canvas(n, generator), torch.arange(PLACES)[None]
    seldom = torch.rand(n, generator=generator) < 0.3
    source.style = torch.where(is_kind["style-change"] & seldom, draw(n, len(STYLES), generator), 0)
    source.tone = torch.where(is_kind["tone-transfer"] & seldom, draw(n, len(TONES), generator), 0)
    used = slot < size[:, None]
    fill = torch.cat([group, torch.full((n, 1), EMPTY)], 1)
    source.things = torch.where(used, fill, EMPTY)
    source.paints = torch.where(used, torch.cat([paints, torch.zeros(n, 1, dtype=torch.int64)], 1), NATURAL)
    # Whatever is brought in already has its place while the others are put, so that there is room for it.
    ahead = source.clone()
    place = torch.where(is_kind["subject-add"], size, 0)
    ahead.things[row[is_kind["subject-add"]], size[is_kind["subject-add"]]] = 0
    side, far, moves = draw(n, len(SIDES), generator), torch.rand(n, generator=generator), is_kind["motion-change"]

    def room_to_move(part: Scene, rows: torch.Tensor) -> torch.Tensor:
        part = part.clone()
        before = part.centres[:, 0].clone()
        part.centres[:, 0] = after = moved(before, part.sizes[:, 0], side[rows], far[rows])
        well = free(part.sizes, part.centres, part.occupied) & ((after - before).abs().amax(-1) > 10)
        return well | ~moves[rows]

    put(ahead, ahead.occupied, generator, room_to_move)
    source.centres, source.sizes = ahead.centres, ahead.sizes

    result = source.clone()
    result.centres[moves, 0] = moved(source.centres[:, 0], source.sizes[:, 0], side, far)[moves]
    result.things[row[brings], place[brings]] = group[brings, 2]
    result.paints[row[brings], place[brings]] = paints[brings, 2]
    result.things[text, 0] = letters[text, 1]
    removed = is_kind["subject-remove"]
    result.things[removed, 0], result.paints[removed, 0] = EMPTY, NATURAL
    paint = _other_paint(group[:, 0], source.paints[:, 0], split, is_kind["material-alter"], generator)
    altered = is_kind["color-alter"] | is_kind["material-alter"]
    result.paints[altered, 0] = paint[altered]
    for kind, name, count in (
        ("background-change", "background", len(BACKGROUNDS)),
        ("tone-transfer", "tone", len(TONES)),
        ("style-change", "style", len(STYLES)),
    ):
        value = getattr(source, name)
        other = (value + 1 + draw(n, count - 1, generator)) % count
        setattr(result, name, torch.where(is_kind[kind], other, value))
    columns = (kinds, source.things[:, 0], result.things[row, place], result.paints[row, place], side)
    return _instructions((*columns, result.background, result.tone, result.style), place), source, result


def _draw_paints(group: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns a look for each class index of [B, 3]: natural in half, else a seen colour or a material."""
    weights = torch.cat([allowed_colors("seen").float(), torch.full((len(CLASSES), len(MATERIALS)), 0.5)], 1)
    painted = torch.multinomial(weights[group.reshape(-1)], 1, generator=generator).view(group.shape)
    return torch.where(torch.rand(group.shape, generator=generator) < 0.5, painted, NATURAL)


def _other_paint(
    thing: torch.Tensor, current: torch.Tensor, split: str, material: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Returns a colour of the split, or a material, other than the current paint: [B] int64."""
    n = len(thing)
    colors = allowed_colors(split)[thing.clamp(max=len(CLASSES) - 1)]
    weights = torch.cat([colors & ~material[:, None], material[:, None].expand(n, len(MATERIALS))], 1).float()
    weights[torch.arange(n), current] = 0
    empty = weights.sum(-1) == 0  # a held-out colour that is there already
    weights[empty, 1 : len(COLORS)] = 1
    weights[torch.arange(n), current] = 0
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def moved(centres: torch.Tensor, sizes: torch.Tensor, side: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """Returns centres [B, 2] moved straight to their side, far [B] in [0, 1) of a quarter of the way from it."""
    share = torch.where(side % 2 == 0, far / 4, 1 - (1 - far) / 4 - 1e-4)
    along = on_lattice(sizes, share[:, None])[:, 0]
    y, x = centres.unbind(-1)
    return torch.stack([torch.where(side < 2, y, along), torch.where(side < 2, along, x)], -1)


def _instructions(columns: tuple[torch.Tensor, ...], place: torch.Tensor) -> list[Edit]:
    """Writes the instructions of edits from [B] columns: kind, old thing, new thing and its paint, the side, and the
    new background, tone and style; place is the one that changes."""
    edits, names = [], (*THINGS, "")
    for kind, old, new, paint, side, background, tone, style, at in zip(
        *(c.tolist() for c in (*columns, place)), strict=True
    ):
        name = KINDS[kind]
        text = INSTRUCTIONS[name].format(
            old=names[old],
            new=names[new],
            painted="" if new == EMPTY else painted(new, paint),
            paint=PAINTS[paint],
            side=SIDES[side],
            background=BACKGROUNDS[background],
            tone=TONES[tone],
            style=STYLES[style],
        )
        edits.append(Edit(text, name, -1 if name in GLOBAL_KINDS else at))
    return edits


def painted(thing: int, paint: int) -> str:
    """Writes "a red car", "a car of wood"."""
    if paint < len(COLORS):
        return named(thing, paint)
    return f"{named(thing, NATURAL)} of {PAINTS[paint]}"
