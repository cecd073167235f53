"""Judges pictures of the miniature's world exactly, in the place of GenEval's detector and of GEdit-Bench's judge."""

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from danceopd.evaluation.gedit.judge import Verdict
from danceopd.evaluation.geneval.rules import Found, Objects
from danceopd.miniature.detector import Detection, detect
from danceopd.miniature.edits import GLOBAL_KINDS, INSTRUCTIONS, SIDES, moved
from danceopd.miniature.looks import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    EMPTY,
    IMAGE_SIZE,
    PAINTS,
    SIZES,
    STYLES,
    THINGS,
    TONES,
)
from danceopd.miniature.scene import Scene
from danceopd.miniature.scores import edit_scores
from danceopd.support.errors import UserError
from danceopd.world.edits import Edit
from danceopd.world.sprites import NATURAL


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """Returns a picture as [1, 3, 64, 64] in [-1, 1]. Raises UserError for one of another size."""
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(f"a picture of {picture.width} x {picture.height} is none of the miniature's {IMAGE_SIZE}")
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


@dataclass(frozen=True)
class Seen(Found):
    """One thing that was found, with its colour."""

    color: str = COLORS[NATURAL]


class MiniatureReader:
    """Finds the objects of pictures for GenEval's rules."""

    name = "miniature"

    def detect(self, pictures: list[Image.Image]) -> list[Objects]:
        """Returns what is in each picture, by class."""
        seen = detect(torch.cat([to_tensor(picture) for picture in pictures]))
        return [self._objects(seen, i) for i in range(len(pictures))]

    def _objects(self, seen: Detection, i: int) -> Objects:
        objects: Objects = {name: [] for name in CLASSES}
        for k in seen.found[i].nonzero()[:, 0].tolist():
            thing, paint = THINGS[int(seen.scene.things[i, k])], PAINTS[int(seen.scene.paints[i, k])]
            half = SIZES[int(seen.scene.sizes[i, k])] / 2
            y, x = seen.scene.centres[i, k].tolist()
            if thing in objects:  # certain, since counting asks for more confidence than one with a blur has
                objects[thing].append(Seen((x - half, y - half, x + half, y + half), 1.0, None, paint))
        return objects

    def name_colors(self, picture: Image.Image, name: str, found: list[Found]) -> list[str]:
        """Returns the colour of each object that detect found."""
        return [one.color for one in found if isinstance(one, Seen)]


class MiniatureJudge:
    """Judges edits: what was asked is read from the instruction and the picture to edit."""

    name = "miniature"

    def check(self) -> None:
        """Does nothing: there is nothing to be reached."""

    def verdict(self, instruction: str, source: Image.Image, edited: Image.Image) -> Verdict:
        """Returns SC and PQ of one edit, each as its two equal marks."""
        before = detect(to_tensor(source)).scene
        try:
            edit, expected = asked(instruction, before)
        except ValueError as error:
            return Verdict(problem=str(error))
        scores = edit_scores([edit], before, expected, detect(to_tensor(edited)))
        return Verdict((float(scores["sc"]),) * 2, (float(scores["pq"]),) * 2)


@lru_cache(maxsize=1)
def _patterns() -> dict[str, re.Pattern]:
    things, paints = "|".join(THINGS), "|".join(PAINTS)
    groups = {
        "old": f"(?P<old>{things})",
        "new": f"(?P<new>{things})",
        "painted": f"an? (?:(?P<color>{'|'.join(COLORS[1:])}) )?(?P<new>{things})(?: of (?P<material>{paints}))?",
        "paint": f"(?P<paint>{paints})",
        "side": f"(?P<side>{'|'.join(SIDES)})",
        "background": f"(?P<background>{'|'.join(BACKGROUNDS)})",
        "tone": f"(?P<tone>{'|'.join(TONES)})",
        "style": f"(?P<style>{'|'.join(STYLES)})",
    }
    return {kind: re.compile(text.format(**groups)) for kind, text in INSTRUCTIONS.items()}


def asked(instruction: str, before: Scene) -> tuple[Edit, Scene]:
    """Reads an instruction about a scene.

    Args:
        instruction: In the words of miniature.edits.
        before: One picture's scene, of which the expected one differs in nothing but what is asked. A thing that is
            added has no place of its own: it is expected at any.

    Returns:
        The edit and the expected scene.

    Raises:
        ValueError: The instruction is none of this world, or asks for something that is not there.
    """
    matches = [(kind, pattern.fullmatch(instruction)) for kind, pattern in _patterns().items()]
    kind, words = next(((kind, found.groupdict()) for kind, found in matches if found), ("", {}))
    if not kind:
        raise ValueError(f"{instruction!r} is no edit of the miniature's world")
    after = before.clone()
    if kind in GLOBAL_KINDS:
        for name, values in (("background", BACKGROUNDS), ("tone", TONES), ("style", STYLES)):
            if name in words:
                getattr(after, name)[0] = values.index(words[name])
        return Edit(instruction, kind, -1), after
    if kind == "subject-add":
        at = next((k for k in range(before.things.shape[1]) if before.things[0, k] == EMPTY), None)
    else:
        at = next((k for k, thing in enumerate(before.things[0].tolist()) if thing == THINGS.index(words["old"])), None)
    if at is None:
        raise ValueError(f"{instruction!r}: the picture has no {words.get('old', 'room')}")
    if kind == "subject-remove":
        after.things[0, at], after.paints[0, at] = EMPTY, NATURAL
    elif kind == "motion-change":
        side, far = torch.tensor([SIDES.index(words["side"])]), torch.tensor([0.5])
        after.centres[:, at] = moved(before.centres[:, at], before.sizes[:, at], side, far)
    elif "paint" in words:
        after.paints[0, at] = PAINTS.index(words["paint"])
    else:
        after.things[0, at] = THINGS.index(words["new"])
        if kind != "text-change":
            after.paints[0, at] = PAINTS.index(words["color"] or words["material"] or COLORS[NATURAL])
    return Edit(instruction, kind, at), after
