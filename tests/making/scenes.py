"""Random scenes, and what of them is held out."""

import re

import torch
from hypothesis import strategies as st

from danceopd.world.prompts import (
    HELD_OUT_COLORS,
    HELD_OUT_PAIRS,
)
from danceopd.world.scene import Scene
from danceopd.world.sprites import BACKGROUNDS, CLASSES, COLORS, EMPTY, JITTER, STYLES

SEEDS = st.integers(0, 2**40)


PAIR = torch.zeros(EMPTY + 1, EMPTY + 1, dtype=torch.bool)


for one, two in map(tuple, HELD_OUT_PAIRS):
    PAIR[CLASSES.index(one), CLASSES.index(two)] = PAIR[CLASSES.index(two), CLASSES.index(one)] = True


TINT = torch.zeros(EMPTY + 1, len(COLORS), dtype=torch.bool)


for name, color in HELD_OUT_COLORS:
    TINT[CLASSES.index(name), COLORS.index(color)] = True


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_scene(n, seed=0) -> Scene:
    """Any picture that can be drawn at all, in either split or neither."""
    g = generator(seed)

    def pick(high, *shape):
        return torch.randint(high, shape, generator=g)

    objects = pick(EMPTY + 1, n, 4)
    colors = torch.where(objects == EMPTY, 0, pick(len(COLORS), n, 4))
    return Scene(pick(len(BACKGROUNDS), n), pick(len(STYLES), n), objects, colors, pick(len(JITTER), n, 4))


def held_out_pair(scene):
    return PAIR[scene.objects[:, :, None], scene.objects[:, None]].any(-1).any(-1)


def held_out_tint(scene):
    return TINT[scene.objects, scene.colors].any(-1)


def same_scene(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in vars(a))


CLASS, COLOR = "|".join(CLASSES), "|".join(COLORS[1:])


def articles_are_right(text):
    found = re.findall(r"\b(an?) (\w)", text)
    return all((article == "an") == (letter in "aeiou") for article, letter in found)


def named(text):
    """Class and colour indices in the order of the text."""
    words = re.findall(rf"(?:({COLOR}) )?\b({CLASS})s?\b", text)
    return tuple((CLASSES.index(name), COLORS.index(color) if color else 0) for color, name in words)
