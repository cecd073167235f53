"""A user's own data: a manifest (JSONL or CSV) of prompts and picture files, checked line by line.

Columns: id (or uid), task (or capability), prompt, source_image, target_image (or edited_image); others are for the
texts that sources are asked with, where these name them. Every row needs a prompt, which may stand in caption_dict, a
mapping as JSON or Python writes it. A row without a task is of the task "default", one without an id goes by its line.
The file is JSON lines if it ends in .jsonl or begins with a brace, and else CSV.
source_image is a path or, for several source pictures, a list of them in their order; a CSV cell holds that list as
JSON: ["a.png", "b.png"]. Picture paths are relative to the manifest's folder, or to the `root` given, and may not leave
it: a shared manifest must not read its reader's files.
"""

import ast
import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from danceopd.data.bad_rows import Problem
from danceopd.data.column_names import meant, misnamed
from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean
from danceopd.support.paths import near_path
from danceopd.support.pictures import decode_picture
from danceopd.support.texts import lines_of, many, parse_json

SUFFIXES = (".jsonl", ".csv")

DEFAULT = "default"  # the task of rows that name none

CAPTIONS = ("prompt", "caption", "instruction")  # keys of a caption_dict, the first that holds something

_SHOWN = 5  # problems or lines named in one error message

LONGEST_SIDE = 8  # times the shorter one, of a picture that is used: of a longer one little would be left


@dataclass(frozen=True, slots=True)
class Row:
    """One good line of a manifest; pictures are resolved paths of files that exist.

    Attributes:
        columns: All columns that hold text, as texts take them (`support.texts.filled`).
        misnamed: Columns that are passed over, each with that which it seems to stand for (`data.column_names`).
    """

    line: int
    id: str
    capability: str
    prompt: str
    source_images: tuple[Path, ...]
    target_image: Path | None
    columns: dict[str, str] = field(default_factory=dict, hash=False, compare=False)
    misnamed: tuple[tuple[str, str], ...] = field(default=(), hash=False, compare=False)

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The sources, then the target."""
        return self.source_images + ((self.target_image,) if self.target_image else ())


def read_manifest(
    path: str | Path,
    root: str | Path | None = None,
    *,
    needs_source: Iterable[str] = (),
    decode: bool = False,
) -> tuple[list[Row], list[Problem]]:
    """Reads every line of a manifest.

    Args:
        path: JSONL or CSV, in UTF-8.
        root: The folder that picture paths start from; the manifest's own if not given.
        needs_source: Capabilities whose rows must have a source picture.
        decode: Whether every picture is opened and decoded to its end, or only has to be there.

    Returns:
        The good rows, and all problems in order of line.

    Raises:
        FileNotFoundError: The file or the folder is missing.
        UserError: The file as a whole is of no use: empty, or not UTF-8.
    """
    path, needs_source = Path(path), frozenset(needs_source)
    text = _read_text(path)
    root = path.parent if root is None else Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"the folder of pictures {root} is not there; give the one that paths start from")
    root = root.resolve()
    suffix = path.suffix.lower()
    by_lines = suffix == ".jsonl" or (suffix != ".csv" and text.lstrip().startswith("{"))
    records = _json_records(text) if by_lines else _csv_records(text)
    rows, problems = [], []
    first_line: dict[str, int] = {}
    listed: dict = {}  # folders that were looked through for a name
    damage: dict[Path, str] = {}  # so that a picture shared by many rows is decoded once
    for line, record in records:
        if isinstance(record, str):
            problems.append(Problem(line, record))
            continue
        row, messages = _parse_row(line, record, root, listed)
        if row.id in first_line:
            messages.append(f"id {row.id!r} is that of line {first_line[row.id]} too; make it unique")
        first_line.setdefault(row.id, line)
        if row.capability in needs_source and not str(record.get("source_image") or "").strip(" []"):
            messages.append(f"{row.capability!r} edits a picture, so the row needs a source_image")
        if decode:
            for picture in dict.fromkeys(row.pictures):
                if picture not in damage:
                    damage[picture] = _damage(picture)
                if damage[picture]:
                    messages.append(f"picture {picture.relative_to(root)}: {damage[picture]}")
        problems += [Problem(line, message) for message in messages]
        if not messages:
            rows.append(row)
    if not rows and not problems:
        raise UserError(f"{path} has no rows; add one line for each sample")
    return rows, problems


def check_manifest(path: str | Path, root: str | Path | None = None, needs_source: Iterable[str] = ()) -> list[Problem]:
    """Returns all problems of a manifest and its pictures, every one of which is decoded; raises as read_manifest."""
    return read_manifest(path, root, needs_source=needs_source, decode=True)[1]


def no_rows(path: Path | str, capability: str, there: Iterable[str]) -> str:
    """Says that a file has no rows of a capability, and how rows of another name are taken.

    Args:
        path: The file.
        capability: The name that was looked for.
        there: The names that its rows have.

    Returns:
        The message.
    """
    near = did_you_mean(capability, there)
    return f"{path} has no rows of {capability!r}{near}; `capability: NAME` beside its `task` takes rows of that name"


def _read_text(path: Path) -> str:
    """Returns the manifest's text; raises FileNotFoundError or UserError with what to do."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the manifest in it (a {' or '.join(SUFFIXES)} file)")
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}{near_path(path) or '; check the path'}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8 (line {line}); save it with that encoding") from error
    if not text.strip():
        raise UserError(f"{path} is empty; add one line for each sample")
    return text


def _json_records(text: str) -> Iterator[tuple[int, dict | str]]:
    """Returns the line and object of each line that is not blank, or a message in the object's place."""
    for line, content in lines_of(text):
        try:
            record = parse_json(content)
        except ValueError as error:
            yield line, f"not JSON ({error}); write one object on each line"
            continue
        yield line, record if isinstance(record, dict) else "not a JSON object; write {...} on each line"


def _csv_records(text: str) -> Iterator[tuple[int, dict | str]]:
    """Returns the first line and cells by column of each CSV row, or a message in the cells' place."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not CSV ({error}); close every quote, and double the quotes inside"
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if message := _header_problem(header):
                yield line, message
                return
        elif len(cells) > len(header):
            yield line, f"{len(cells)} cells under {many(len(header), 'column')}; quote cells that hold a comma"
        else:
            record = dict(zip(header, cells, strict=False))
            sources = record.get("source_image", "").strip()
            if sources.startswith("[") and sources.endswith("]"):
                try:
                    record["source_image"] = parse_json(sources)
                except ValueError as error:
                    yield line, f'source_image is not JSON ({error}); write a list as ["a.png", "b.png"]'
                    continue
            yield line, record


def _header_problem(header: list[str]) -> str:
    """Returns what keeps every row of a CSV from being read, or ""."""
    found = f"the header has {', '.join(header)}"
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        return f"columns named twice: {', '.join(repeated)}"
    if "prompt" not in header:
        named = next((name for name in header if meant(name) == "prompt"), None)
        mend = f"rename {named!r} to it" if named else "columns are separated by commas"
        return f"no column 'prompt' ({found}); {mend}"
    return ""


def _parse_row(line: int, record: dict, root: Path, listed: dict) -> tuple[Row, list[str]]:
    """Returns the row as far as it can be read, and what is wrong with it."""
    messages: list[str] = []

    def text(column: str) -> str | None:
        """Returns the stripped cell, "" if there is none, None if it is reported as no text."""
        value = record.get(column)
        if column in ("id", "uid") and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None or isinstance(value, str):
            return (value or "").strip()
        messages.append(f"{column} is {json.dumps(value)[:40]}, not text; put it in quotes")
        return None

    def found(column: str, name: str) -> Path | None:
        path, message = _find_picture(name, root, listed)
        if message:
            messages.append(f"{column} {name[:200]!r} {message}")
        return path

    def picture(column: str) -> Path | None:
        name = text(column)
        return found(column, name) if name else None

    def pictures(column: str) -> tuple[Path, ...]:
        names = record.get(column)
        if not isinstance(names, list):
            paths = [picture(column)]
        elif all(isinstance(name, str) and name.strip() for name in names):
            paths = [found(column, name.strip()) for name in names]
        else:
            messages.append(f"{column} is {json.dumps(names)[:40]}; a list must hold paths")
            paths = []
        return tuple(path for path in paths if path)

    wrong_names = misnamed(record)
    task, capability, prompt = text("task"), text("capability"), text("prompt")
    if task and capability and task != capability:
        messages.append(f"task {task!r} and capability {capability!r} differ; give one of them")
    if prompt == "":
        prompt, problem = _caption(record.get("caption_dict"))
        named = next((name for name, wanted in wrong_names if wanted == "prompt"), None)
        problem += f" (the column {named!r} is not read; rename it to 'prompt')" if problem and named else ""
        messages += [problem] if problem else []
    target, edited = picture("target_image"), picture("edited_image")
    if target and edited and target != edited:
        messages.append("target_image and edited_image differ; give one of them")
    row = Row(
        line=line,
        id=text("id") or text("uid") or f"line {line}",
        capability=task or capability or DEFAULT,
        prompt=prompt or "",
        source_images=pictures("source_image"),
        target_image=target or edited,
        columns={name: value.strip() for name, value in record.items() if name and isinstance(value, str)}
        | {"prompt": prompt or ""},
        misnamed=wrong_names,
    )
    return row, messages


def _caption(value: object) -> tuple[str, str]:
    """Returns the prompt that a caption_dict gives where a row has none; or "", and what is wrong."""
    if isinstance(value, str) and value.strip():
        text = value.strip()
        try:
            value = parse_json(text)
        except ValueError:
            try:
                value = ast.literal_eval(text)  # as Python writes a dict; it runs nothing
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                value = text
        if not isinstance(value, dict):
            return "", "caption_dict is no mapping; write it as JSON"
    value = value if isinstance(value, dict) else {}
    texts = [value.get(key) for key in CAPTIONS] + list(value.values())
    found = next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")
    if found.encode("utf-8", "ignore").decode() != found:
        return "", "caption_dict holds half a character (a lone surrogate)"
    return found, "" if found else "no prompt; describe the picture or the edit"


def _find_picture(name: str, root: Path, listed: dict) -> tuple[Path | None, str]:
    """Returns the file that a picture path stands for; or None, and why there is none."""
    outside = f"leads out of the folder {root}; move the picture into it"
    try:
        if Path(name).is_absolute():
            return None, f"is an absolute path; write it relative to {root}"
        path = (root / name).resolve()  # follows links, so that none leads out unnoticed
        if not path.is_relative_to(root):
            return None, outside
        if not path.is_file():
            return None, f"is not there (or not a file){near_path(name, root, listed)}"
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a ring of links
        return None, f"is not a path that can be opened ({type(error).__name__}: {error})"
    return path, ""


def usable_picture(path: Path) -> Image.Image:
    """Decodes a picture to its end.

    Raises:
        ValueError: It cannot be used, with the reason.
    """
    picture = decode_picture(path)
    if max(picture.size) > LONGEST_SIDE * min(picture.size):
        raise ValueError(f"{picture.width} x {picture.height} is longer than {LONGEST_SIDE} : 1; cut it")
    return picture


def _damage(path: Path) -> str:
    """Returns why a picture can't be used, or ""."""
    try:
        usable_picture(path)
    except ValueError as error:
        return str(error)
    return ""


def _first(items: list, separator: str) -> str:
    """Returns the first few items, and how many more there are."""
    shown = separator.join(str(item) for item in items[:_SHOWN])
    return shown + (f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
