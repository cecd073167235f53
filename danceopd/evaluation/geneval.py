"""GenEval's rules: is a picture what its prompt asks, given the objects that a detector found in it.

The rules, constants and files are those of github.com/djghosh13/geneval (evaluation/evaluate_images.py and
summary_scores.py); docs/evaluation.md says what was compared with them, and how.
"""

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from danceopd.checkpoint import write_atomic
from danceopd.errors import UserError

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


# ------------------------------------------------------------------------------------------------- the rules


def kept(found: list[Found], tag: str, max_overlap: float = 1.0) -> list[Found]:
    """The detections of a class that count, most confident first.

    max_overlap: of two boxes that share more of their union, or as much, only the more confident one stays; 1: both.
    """
    limit = np.float32(COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE)
    best = sorted((f for f in found if np.float32(f.confidence) > limit), key=lambda f: -f.confidence)
    result: list[Found] = []
    for one in best[:MAX_OBJECTS]:
        if max_overlap == 1 or all(overlap(one.box, other.box) < max_overlap for other in result):
            result.append(one)
    return result


def overlap(a: tuple, b: tuple) -> float:
    """Two boxes' intersection over their union, where a box of pixels x0 to x1 is x1 - x0 + 1 wide, as the source's."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a, b

    def area(x0, y0, x1, y1):
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    both = area(max(ax0, bx0), max(ay0, by0), min(ax1, bx1), min(ay1, by1))
    union = area(*a) + area(*b) - both
    return both / union if union else 0.0


def relations(a: tuple, b: tuple) -> list[str]:
    """Where box a is from box b: none, one or two of RELATIONS.

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


def judge(metadata: dict, objects: Objects, colors_of: ColorsOf) -> tuple[bool, str]:
    """(is the picture right, what is wrong with it, a line each).

    metadata: a line of the benchmark, as check_metadata takes it; objects: what counts of each class, as kept has it.
    Each `include` clause looks at the `count` most confident objects of its class alone: enough of them must be there,
    have the colour, and all stand in the relation to all objects of an earlier clause, which must have held itself.
    An `exclude` clause fails at `count` objects.
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
    """What an `include` clause lacks."""
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


# ------------------------------------------------------------------------------------------------- its files


def check_metadata(metadata: dict, where: str) -> dict:
    """A prompt's line as it is. Raises UserError that begins with `where` for one that the rules cannot read."""

    def need(holds: bool, problem: str) -> None:
        if not holds:
            raise UserError(f"{where}: {problem}")

    need(isinstance(metadata, dict), "not a JSON object; give GenEval's evaluation_metadata.jsonl")
    for key in ("tag", "prompt", "include"):
        near = difflib.get_close_matches(key, metadata, 1)
        need(key in metadata, f"no {key!r}" + (f", but {near[0]!r}" if near else "") + "; see GenEval's metadata")
    for key in ("tag", "prompt"):
        need(isinstance(metadata[key], str), f"{key!r} must be a text")
    need(bool(metadata["include"]) or bool(metadata.get("exclude")), "asks for nothing: 'include' is empty")
    for key in ("include", "exclude"):
        clauses = metadata.get(key, [])
        need(isinstance(clauses, list) and all(isinstance(c, dict) for c in clauses), f"{key!r} must be a list of {{}}")
        for place, clause in enumerate(clauses):
            at = f"{key}[{place}]"
            extra = sorted(set(clause) - (CLAUSE if key == "include" else {"class", "count"}))
            need(not extra, f"{at} has an unknown key {extra[0] if extra else ''!r}")
            near = difflib.get_close_matches(str(clause.get("class")), CLASSES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; the classes are COCO's, by GenEval's names"
            need(clause.get("class") in CLASSES, f"{at} asks for the class {clause.get('class')!r}{hint}")
            count = clause.get("count")
            need(isinstance(count, int) and not isinstance(count, bool) and count >= 1, f"{at} needs a count from 1 on")
            color = clause.get("color", COLORS[0])
            need(color in COLORS, f"{at} asks for the colour {color!r}; there are {', '.join(COLORS)}")
            if "position" in clause:
                position = clause["position"]
                good = (
                    isinstance(position, list)
                    and len(position) == 2
                    and position[0] in RELATIONS
                    and position[1] in range(place)
                )
                need(good, f"{at} has the position {position!r}; it is [{'|'.join(RELATIONS)}, an earlier clause]")
    return metadata


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """(where it stands, the object) of every line of a JSONL file. Raises UserError for what is none."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    lines = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                lines.append((f"{path}:{number}", json.loads(line)))
            except ValueError as error:
                raise UserError(f"{path}:{number}: not JSON, or torn ({error}); make the file again") from None
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def read_metadata(path: Path) -> list[dict]:
    """The prompts of the benchmark's evaluation_metadata.jsonl. Raises UserError that names the line."""
    return [check_metadata(metadata, where) for where, metadata in read_lines(path)]


@dataclass(frozen=True)
class Drawn:
    """A prompt's folder: its number, its line of the metadata, and its pictures by number."""

    index: int
    metadata: dict
    pictures: dict[int, Path]


def prompt_folder(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}"


def read_pictures(
    folder: Path,
    metadata: list[dict] | None = None,
    samples: int | None = None,
    check: Callable[[dict, str], dict] = check_metadata,
) -> list[Drawn]:
    """The pictures that any tool drew in the benchmark's layout, by prompt: NNNNN/metadata.jsonl, NNNNN/samples/N.png.

    metadata, samples: what must be there, if given; check: of each prompt's line. Raises UserError for a folder that
    holds no such pictures, for a prompt without any, and for pictures that are damaged; the first of each are named.
    """
    draw = "draw them by danceopd evaluate geneval --model"
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one of pictures in GenEval's layout, or {draw}")
    numbered = sorted((int(p.name), p) for p in folder.iterdir() if p.is_dir() and p.name.isdecimal())
    if not numbered:
        raise UserError(f"{folder} holds no pictures in GenEval's layout (00000/samples/0000.png); {draw}")
    found = []
    for index, place in numbered:
        [(where, line), *more] = read_lines(place / "metadata.jsonl")
        if more:
            raise UserError(f"{place / 'metadata.jsonl'} holds {1 + len(more)} lines; it is one prompt's")
        at = place / "samples"
        paths = [p for p in at.iterdir() if p.is_file() and SAMPLE.fullmatch(p.name)] if at.is_dir() else []
        pictures = {int(path.stem): path for path in sorted(paths)}
        if len(pictures) < len(paths):
            raise UserError(f"{at} holds pictures of the same number; two tools drew there: remove those of one")
        found.append(Drawn(index, check(line, where), dict(sorted(pictures.items()))))
    if metadata is not None:
        _check_prompts(folder, found, metadata)
    if bare := [f"{prompt.index:05d}" for prompt in found if len(prompt.pictures) < (samples or 1)]:
        raise UserError(f"{folder}: {_some(bare)} lack pictures; draw them, or remove these folders")
    if bad := [str(path) for prompt in found for path in prompt.pictures.values() if not _is_whole(path)]:
        raise UserError(f"damaged pictures: {_some(bad)}; remove them and draw them again")
    return found


def _check_prompts(folder: Path, found: list[Drawn], metadata: list[dict]) -> None:
    expected, there = dict(enumerate(metadata)), {prompt.index: prompt.metadata for prompt in found}
    if missing := [f"{index:05d}" for index in expected if index not in there]:
        raise UserError(f"{folder} lacks {_some(missing)} of {len(expected)} prompts; give --model to draw the rest")
    if other := [f"{index:05d}" for index, line in there.items() if line != expected.get(index)]:
        raise UserError(f"{folder}: {_some(other)} are not prompts of the metadata; give those that were drawn")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()  # every chunk's checksum: decoding them all would take minutes
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def record(path: Path, metadata: dict, objects: Objects, correct: bool, reason: str) -> dict:
    """A picture's line of the results, of the fields that the source writes."""
    boxes = {name: [[*one.box, one.confidence] for one in found] for name, found in objects.items() if found}
    return {
        "filename": str(path),
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(boxes),
    }


def write_results(path: Path, records: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in records).encode())


def read_results(path: Path) -> list[dict]:
    """The lines of a results file, ours or the source's. Raises UserError that names a line without what is needed."""
    records = []
    for where, line in read_lines(path):
        if not isinstance(line, dict) or not isinstance(line.get("correct"), bool):
            raise UserError(f"{where}: no true or false under 'correct'; give the results of a GenEval evaluation")
        for key in ("tag", "metadata", "filename"):
            if not isinstance(line.get(key), str):
                raise UserError(f"{where}: no text under {key!r}; give the results of a GenEval evaluation")
        records.append(line)
    return records


def summary(records: list[dict]) -> dict:
    """{"overall", "tags": {tag: {"score", "correct", "pictures"}}, "pictures", "prompts", "correct_pictures",
    "correct_prompts"}: shares from 0 to 1.

    overall is the mean of the tags' shares of right pictures, a prompt is right if any picture of it is; prompts are
    told apart by their whole metadata.
    """
    tags: dict[str, list[bool]] = {}
    prompts: dict[str, bool] = {}
    for line in records:
        tags.setdefault(line["tag"], []).append(line["correct"])
        prompts[line["metadata"]] = prompts.get(line["metadata"], False) or line["correct"]
    scores = {t: {"score": sum(v) / len(v), "correct": sum(v), "pictures": len(v)} for t, v in tags.items()}
    return {
        "overall": sum(score["score"] for score in scores.values()) / len(scores),
        "tags": scores,
        "pictures": len(records),
        "prompts": len(prompts),
        "correct_pictures": sum(line["correct"] for line in records) / len(records),
        "correct_prompts": sum(prompts.values()) / len(prompts),
    }


def format_summary(scores: dict) -> str:
    """The summary as lines of text."""
    lines = [
        f"{tag:16s} {100 * score['score']:6.2f} %   {score['correct']} of {score['pictures']}"
        for tag, score in scores["tags"].items()
    ]
    return "\n".join(
        [
            *lines,
            f"{'overall':16s} {scores['overall']:.5f}    the mean of {len(lines)} tags",
            f"right: {scores['correct_pictures']:.2%} of {scores['pictures']} pictures; at least one picture of "
            f"{scores['correct_prompts']:.2%} of {scores['prompts']} prompts",
        ]
    )
