"""Scores pictures of the world exactly: GenEval's tasks for text-to-image, VIEScore's two parts for edits."""

import torch

from danceopd.world.detector import Detection
from danceopd.world.edits import Edit
from danceopd.world.prompts import Prompt
from danceopd.world.scene import CELLS, Scene
from danceopd.world.sprites import CELL_SIZE, EMPTY, GRID, JITTER

# PQ is 10 up to the first root mean square error from a clean rendering and 0 from the second.
_CLEAN_ERROR, _UNCLEAN_ERROR = 0.02, 0.20

_JITTER = torch.tensor(JITTER)


def _centres(scene: Scene) -> torch.Tensor:
    """Returns object centres in pixels: [B, 4, 2] (y, x)."""
    cell = torch.arange(CELLS)
    corner = torch.stack([cell // GRID, cell % GRID], -1) * CELL_SIZE + CELL_SIZE / 2
    return corner + _JITTER[scene.jitter]


def geneval_correct(prompts: list[Prompt], detection: Detection) -> torch.Tensor:
    """Judges pictures by GenEval's rules: [B] bool.

    Single object, two objects, colours and attribution: every object named is there, in its colour where one is named.
    Counting: exactly that many. Position: some such pair of centres is apart by more than half of their distance along
    the axis named.
    """
    scene = detection.scene
    return judge(prompts, detection.found, scene.objects, scene.colors, _centres(scene))


def judge(
    prompts: list[Prompt], found: torch.Tensor, objects: torch.Tensor, colors: torch.Tensor, centres: torch.Tensor
) -> torch.Tensor:
    """Judges what was found in pictures of any world by GenEval's rules, as geneval_correct has them.

    Args:
        prompts: Of the B pictures; their objects are class and colour indices.
        found: [B, N] bool, the places that hold something for certain.
        objects, colors: [B, N] int64.
        centres: [B, N, 2] (y, x) in pixels.

    Returns:
        [B] bool.
    """
    correct = []
    for i, prompt in enumerate(prompts):
        match = [
            found[i] & (objects[i] == cls) & ((colors[i] == color) | (color == 0 and prompt.task != "colors"))
            for cls, color in prompt.objects
        ]
        if prompt.task == "counting":
            correct.append(int(match[0].sum()) == prompt.count)
        elif prompt.task == "position":
            correct.append(
                any(
                    _related(centres[i, a], centres[i, b], prompt.relation)
                    for a in match[0].nonzero()[:, 0].tolist()
                    for b in match[1].nonzero()[:, 0].tolist()
                )
            )
        else:
            correct.append(all(bool(m.any()) for m in match))
    return torch.tensor(correct, dtype=torch.bool)


def _related(a: torch.Tensor, b: torch.Tensor, relation: int) -> bool:
    """Returns whether centre a is left of, right of, above or below (0 to 3) centre b."""
    dy, dx = ((a - b) / (a - b).float().norm().clamp(min=1e-6)).tolist()
    return (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)[relation]


def edit_scores(edits: list[Edit], source: Scene, expected: Scene, detection: Detection) -> dict[str, torch.Tensor]:
    """Scores edits by SC, PQ and O = sqrt(SC * PQ), each [B] float32 from 0 to 10, as VIEScore has them.

    SC is ten times the smaller of two shares: was the instruction followed, and how much of the rest (each other cell
    with object, colour and style, and the background) is as it was. PQ falls linearly with the error from the nearest
    clean rendering.
    """
    n = len(edits)
    seen, clear, style = detection.scene, detection.clear, detection.style
    jump = (_JITTER[seen.jitter] - _JITTER[expected.jitter]).abs().amax(-1) > 1
    same_object = (seen.objects == expected.objects) & (seen.colors == expected.colors) & ~jump
    same_style = (style == expected.style[:, None]) | (expected.objects == EMPTY)
    same = same_object & same_style & clear
    same_background = seen.background == expected.background
    followed, kept = torch.zeros(n), torch.zeros(n)
    for i, edit in enumerate(edits):
        if edit.kind == "background-change":
            followed[i] = same_background[i].float()
            kept[i] = same[i].float().mean()
        elif edit.kind == "style-change":
            occupied = expected.occupied[i]
            followed[i] = (same_style & seen.occupied & clear)[i][occupied].float().mean()
            kept[i] = torch.cat([(same_object & clear)[i], same_background[i, None]]).float().mean()
        elif edit.kind == "subject-add":
            at = int((source.objects[i] != expected.objects[i]).nonzero()[0, 0])
            asked = (expected.objects[i, at], expected.colors[i, at], expected.style[i])
            free = source.objects[i] == EMPTY
            new = free & clear[i] & (seen.objects[i] == asked[0]) & (seen.colors[i] == asked[1])
            new &= style[i] == asked[2]
            followed[i] = float(new.any())
            # One new object is asked; a second one counts as a change of what should have stayed empty.
            stays_empty = free & clear[i] & (seen.objects[i] == EMPTY)
            rest = int(stays_empty.sum().clamp(max=int(free.sum()) - 1)) + int(same[i][~free].sum())
            kept[i] = (rest + float(same_background[i])) / CELLS
        else:
            others = torch.arange(CELLS) != edit.target
            place = same if edit.kind != "subject-replace" else same | _same_kind(seen, expected, style, clear)
            followed[i] = float(place[i, edit.target])
            kept[i] = (float(same[i][others].sum()) + float(same_background[i])) / CELLS
    error = detection.error.square().mean(-1).sqrt()
    pq = 10 * ((_UNCLEAN_ERROR - error) / (_UNCLEAN_ERROR - _CLEAN_ERROR)).clamp(0, 1)
    sc = 10 * torch.minimum(followed, kept)
    return {"sc": sc, "pq": pq, "o": (sc * pq).sqrt()}


def _same_kind(seen: Scene, expected: Scene, style: torch.Tensor, clear: torch.Tensor) -> torch.Tensor:
    """Returns [B, 4] bool: as expected up to the jitter, which a replaced object need not keep."""
    same = (seen.objects == expected.objects) & (seen.colors == expected.colors)
    return same & (style == expected.style[:, None]) & clear


def style_share(detection: Detection, style: int) -> torch.Tensor:
    """Returns the share of the objects found that are drawn in the style, [B] float32; 0 where none is found."""
    found = detection.found
    return ((detection.style == style) & found).sum(-1) / found.sum(-1).clamp(min=1)
