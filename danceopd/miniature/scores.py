"""Scores pictures of the miniature's world exactly: GenEval's tasks, and VIEScore's two parts for edits."""

import torch

from danceopd.miniature.detector import Detection
from danceopd.miniature.looks import EMPTY, IMAGE_SIZE, PLACES
from danceopd.miniature.scene import Scene
from danceopd.world.edits import Edit
from danceopd.world.prompts import Prompt
from danceopd.world.scores import judge

# PQ is 10 up to the first root mean square error from a clean rendering and 0 from the second.
_CLEAN_ERROR, _UNCLEAN_ERROR = 0.02, 0.15

_STAYED = 3  # pixels that a thing may move without having moved


def geneval_correct(prompts: list[Prompt], detection: Detection) -> torch.Tensor:
    """Judges pictures by GenEval's rules, as world.scores.geneval_correct has them: [B] bool."""
    scene = detection.scene
    return judge(prompts, detection.found, scene.things, scene.paints, scene.centres)


def _like(scene: Scene, i: int, k: int, detection: Detection, *, moved: bool = False, styled: bool = True) -> list[int]:
    """Returns which things found in picture i are place k of the scene: of its look, and where it is."""
    seen = detection.scene
    same = detection.found[i] & (seen.things[i] == scene.things[i, k]) & (seen.paints[i] == scene.paints[i, k])
    if styled:
        same &= detection.style[i] == scene.style[i]
    if not moved:
        same &= (seen.centres[i] - scene.centres[i, k]).abs().amax(-1) <= _STAYED
    return same.nonzero()[:, 0].tolist()


def _well_placed(edit: Edit, i: int, source: Scene, expected: Scene, centre: torch.Tensor) -> bool:
    """Tells whether a thing with the look that was asked for stands at a centre [2] where the edit may put it: anywhere
    if it is new, near the place of what it replaces, and in the outer third if it was to move there."""
    if edit.kind == "subject-add":
        return True
    before, after = source.centres[i, edit.target], expected.centres[i, edit.target]
    if edit.kind != "motion-change":
        return int((centre - after).abs().max()) <= 2 * _STAYED
    axis = int((after - before).abs().argmax())
    third = IMAGE_SIZE // 3 + _STAYED
    lower = after[axis] < before[axis]
    outer = centre[axis] <= third if lower else centre[axis] >= IMAGE_SIZE - third
    toward = before[axis] - centre[axis] if lower else centre[axis] - before[axis]
    return bool(outer) and int(toward) > _STAYED and int((centre - after).abs()[1 - axis]) <= _STAYED


def edit_scores(edits: list[Edit], source: Scene, expected: Scene, detection: Detection) -> dict[str, torch.Tensor]:
    """Scores edits by SC, PQ and O = sqrt(SC * PQ), each [B] float32 from 0 to 10, as VIEScore has them.

    SC is ten times the smaller of two shares: was the instruction followed, and how much of the rest (each other
    thing's look and place, the background with its tone, and that nothing else came) is as it was. PQ falls linearly
    with the error from the nearest clean rendering.
    """
    n, seen = len(edits), detection.scene
    followed, kept = torch.zeros(n), torch.zeros(n)
    for i, edit in enumerate(edits):
        ground = bool(seen.background[i] == expected.background[i]) and bool(seen.tone[i] == expected.tone[i])
        places = [k for k in range(PLACES) if expected.things[i, k] != EMPTY]
        used: set[int] = set()
        held = {k: next((f for f in _like(expected, i, k, detection) if f not in used), None) for k in places}
        if edit.kind == "motion-change":  # where it stood may be near where it should go
            held[edit.target] = None
        used |= {f for f in held.values() if f is not None}
        others = [k for k in places if k != edit.target]
        rest = [held[k] is not None for k in others]
        if edit.kind in ("background-change", "tone-transfer"):
            followed[i] = float(ground)
        elif edit.kind == "style-change":
            styles = detection.style[i][detection.found[i]] == expected.style[i]
            followed[i] = float(styles.float().mean()) if len(styles) else 0.0
            rest = [bool(_like(expected, i, k, detection, styled=False)) for k in others] + [ground]
        elif edit.kind == "subject-remove":
            left = [_like(source, i, edit.target, detection, styled=False)]
            followed[i] = float(not any(left))
            rest.append(ground)
        else:
            fresh = [f for f in _like(expected, i, edit.target, detection, moved=True) if f not in used]
            found = held[edit.target]
            if found is None:
                found = next((f for f in fresh if _well_placed(edit, i, source, expected, seen.centres[i, f])), None)
            followed[i] = float(found is not None)
            used |= {found} - {None}
            rest.append(ground)
        extra = set(detection.found[i].nonzero()[:, 0].tolist()) - used
        rest.append(not extra or (edit.kind in ("style-change", "subject-remove") and followed[i] < 1))
        kept[i] = sum(rest) / len(rest)
    pq = 10 * ((_UNCLEAN_ERROR - detection.rest) / (_UNCLEAN_ERROR - _CLEAN_ERROR)).clamp(0, 1)
    sc = 10 * torch.minimum(followed, kept)
    return {"sc": sc, "pq": pq, "o": (sc * pq).sqrt()}
