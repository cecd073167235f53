"""Reads and writes GenEval's files: metadata, pictures and results."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from danceopd.evaluation.geneval.rules import CLASSES, CLAUSE, COLORS, RELATIONS, SAMPLE, Objects
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.hints import did_you_mean
from danceopd.support.pictures import check_picture_file
from danceopd.support.texts import lines_of, parse_json, read_text


def check_metadata(metadata: dict, where: str) -> dict:
    """Checks a prompt's line and returns it; a UserError that begins with `where` if the rules cannot read it."""

    def need(holds: bool, problem: str) -> None:
        if not holds:
            raise UserError(f"{where}: {problem}")

    need(isinstance(metadata, dict), "not a JSON object; give GenEval's evaluation_metadata.jsonl")
    for key in ("tag", "prompt", "include"):
        hint = did_you_mean(key, metadata, "; see GenEval's metadata")
        need(key in metadata, f"no {key!r}{hint}")
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
            name = clause.get("class")
            hint = did_you_mean(name, CLASSES, "; the classes are COCO's, by GenEval's names")
            need(name in CLASSES, f"{at} asks for the class {name!r}{hint}")
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
                    and type(position[1]) is int  # 0.0 and false are equal to 0, and no place in a list
                    and position[1] in range(place)
                )
                need(good, f"{at} has the position {position!r}; it is [{'|'.join(RELATIONS)}, an earlier clause]")
    return metadata


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """Reads a JSONL file: (where it stands, the object) of every line; a UserError for what is none."""
    lines = []
    for number, line in lines_of(read_text(path)):
        try:
            lines.append((f"{path}:{number}", parse_json(line)))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON, or torn ({error}); make the file again") from None
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def read_metadata(path: Path) -> list[dict]:
    """Reads the prompts of the benchmark's evaluation_metadata.jsonl; a UserError that names the line."""
    return [check_metadata(metadata, where) for where, metadata in read_lines(path)]


@dataclass(frozen=True)
class Drawn:
    """A prompt's folder: its number, its line of the metadata, and its pictures by number."""

    index: int
    metadata: dict
    pictures: dict[int, Path]


def prompt_folder(folder: Path, index: int) -> Path:
    """Returns the folder of a prompt by its place in the metadata."""
    return folder / f"{index:05d}"


def read_pictures(
    folder: Path,
    metadata: list[dict] | None = None,
    samples: int | None = None,
    check: Callable[[dict, str], dict] = check_metadata,
) -> list[Drawn]:
    """Finds the pictures that any tool drew in the benchmark's layout: NNNNN/metadata.jsonl, NNNNN/samples/N.png.

    Args:
        folder: Where they are.
        metadata: The prompts that must be there, if given.
        samples: Pictures that each prompt must have, if given.
        check: Checks each prompt's line.

    Returns:
        The prompts with their pictures.

    Raises:
        UserError: The folder holds no such pictures, a prompt has none, or pictures are damaged; the first are named.
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
        check_picture_file(path)  # every chunk's checksum: decoding them all would take minutes
    except ValueError:
        return False
    return True


def in_json(path: Path) -> str:
    """Writes a path as a text of JSON: a folder's name need not be UTF-8, and is found again by its last parts."""
    return str(path).encode(errors="replace").decode()


def record(path: Path, metadata: dict, objects: Objects, correct: bool, reason: str) -> dict:
    """Returns a picture's line of the results, with the fields that the source writes."""
    boxes = {name: [[*one.box, one.confidence] for one in found] for name, found in objects.items() if found}
    return {
        "filename": in_json(path),
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(boxes),
    }


def write_results(path: Path, records: list[dict]) -> None:
    """Writes the lines of a results file, atomically."""
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in records).encode())


def read_results(path: Path) -> list[dict]:
    """Reads the lines of a results file, ours or the source's; a UserError names a line without what is needed."""
    records = []
    for where, line in read_lines(path):
        if not isinstance(line, dict) or not isinstance(line.get("correct"), bool):
            raise UserError(f"{where}: no true or false under 'correct'; give the results of a GenEval evaluation")
        for key in ("tag", "metadata", "filename"):
            if not isinstance(line.get(key), str):
                raise UserError(f"{where}: no text under {key!r}; give the results of a GenEval evaluation")
        records.append(line)
    return records
