"""Judges whether a picture is what its prompt asks, given the objects that a detector found in it: GenEval's rules.

The rules, constants and files are those of github.com/djghosh13/geneval (evaluation/evaluate_images.py and
summary_scores.py); docs/evaluation.md says what was compared with them, and how.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# COCO's 80 classes by the benchmark's names, in COCO's order.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

RELATIONS = ("left of", "right of", "above", "below")

CONFIDENCE, COUNTING_CONFIDENCE = 0.3, 0.9  # a detection must be above it; the second for the tag "counting"

MAX_OBJECTS = 16  # of a class in a picture

SHRINK = 0.1  # of the sum of two objects' sizes, taken off their offset along each axis

MIN_OFFSET = 1e-3  # pixels; a shorter one is no relation

SAMPLE = re.compile(r"\d+\.png")

CLAUSE = {"class", "count", "color", "position"}


@dataclass(frozen=True)
class Found:
    """One detection: box (x0, y0, x1, y1) in pixels, its end outside; confidence in (0, 1]; mask [H, W] bool."""

    box: tuple[float, float, float, float]
    confidence: float
    mask: np.ndarray | None = None


Objects = dict[str, list[Found]]  # by class

ColorsOf = Callable[[str, list[Found]], list[str]]  # (class, its objects) -> the colour of each


def kept(found: list[Found], tag: str, max_overlap: float = 1.0) -> list[Found]:
    """Returns the detections of a class that count, most confident first.

    Args:
        found: All detections of the class.
        tag: The prompt's; "counting" wants more confidence.
        max_overlap: Of two boxes that share as much of their union, only the more confident one stays; 1 keeps both.
    """
    limit = np.float32(COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE)
    best = sorted((f for f in found if np.float32(f.confidence) > limit), key=lambda f: -f.confidence)
    result: list[Found] = []
    for one in best[:MAX_OBJECTS]:
        if max_overlap == 1 or all(overlap(one.box, other.box) < max_overlap for other in result):
            result.append(one)
    return result


def overlap(a: tuple, b: tuple) -> float:
    """Returns two boxes' intersection over their union; a box of pixels x0 to x1 is x1 - x0 + 1 wide, as GenEval's."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b

    def area(x0, y0, x1, y1):
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    both = area(max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1))
    union = area(*a) + area(*b) - both
    return both / union if union else 0.0


def relations(a: tuple, b: tuple) -> list[str]:
    """Returns where box a is from box b: none, one or two of RELATIONS.

    The offset of the centres, shortened along each axis by a tenth of both boxes' sizes and divided by the whole
    offset's length, must be beyond a half. In float32, as detectors' boxes are in the source.
    """
    a, b = (np.asarray(box, np.float32).reshape(2, 2) for box in (a, b))
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shortened = np.maximum(np.abs(offset) - SHRINK * sizes, 0) * np.sign(offset)
    if (np.abs(shortened) < MIN_OFFSET).all():
        return []
    dx, dy = shortened / np.linalg.norm(offset)
    return [name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds]


def check_picture(metadata: dict, objects: Objects, colors_of: ColorsOf) -> tuple[bool, str]:
    """Checks whether one picture is what its prompt asks.

    Each `include` clause looks at the `count` most confident objects of its class alone: enough of them must be there,
    have the colour, and all stand in the relation to all objects of an earlier clause, which must have held itself.
    An `exclude` clause fails at `count` objects.

    Args:
        metadata: A line of the benchmark, as check_metadata takes it.
        objects: What counts of each class, as kept has it.
        colors_of: (class, its objects) -> the colour of each.

    Returns:
        Whether the picture is right, and what is wrong with it, a line each.
    """
    wrong: list[str] = []
    groups: list[list[Found] | None] = []
    for clause in metadata.get("include", []):
        chosen = objects.get(clause["class"], [])[: clause["count"]]
        problem = _unmet(clause, chosen, groups, colors_of)
        groups.append(None if problem else chosen)
        if problem:
            wrong.append(problem)
    for clause in metadata.get("exclude", []):
        number = len(objects.get(clause["class"], []))
        if number >= clause["count"]:
            wrong.append(f"{clause['class']}: fewer than {clause['count']} asked, {number} found")
    return not wrong, "\n".join(wrong)


def _unmet(clause: dict, chosen: list[Found], groups: list, colors_of: ColorsOf) -> str | None:
    """Returns what an `include` clause lacks."""
    name, count = clause["class"], clause["count"]
    if len(chosen) < count:
        return f"{name}: {count} asked, {len(chosen)} found"
    if "color" in clause:
        colors = colors_of(name, chosen)
        if colors.count(clause["color"]) < count:
            return f"{name}: {count} {clause['color']} asked, found {', '.join(colors)}"
    if "position" in clause:
        relation, target = clause["position"]
        if groups[target] is None:
            return f"{name}: {relation} what was not found"
        for one in chosen:
            for other in groups[target]:
                if relation not in (there := relations(one.box, other.box)):
                    return f"{name}: {relation} asked, found {' and '.join(there) or 'none of the relations'}"
    return None
