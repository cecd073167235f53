"""A Hugging Face datasets folder on disk, written out as pictures and a manifest."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from danceopd.data.bad_rows import BadRows, Problem, list_path, write_list
from danceopd.data.column_names import OTHERWISE, READ
from danceopd.support.bars import bar
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.pictures import decode_picture
from danceopd.support.texts import parse_json, read_text

_OWN = {  # of published data sets
    "id": ("omni_edit_id", "key"),
    "task": ("task_type",),
    "prompt": ("edited_prompt_list",),
}

COLUMNS = {  # a manifest's column: the names it is looked for by, the first that is there
    column: tuple(
        name for name in (*READ[column], *OTHERWISE.get(column, ()), *_OWN.get(column, ())) if name != "caption_dict"
    )
    for column in READ
}

LANGUAGE = "instruction_language"  # GEdit-Bench has a row for each, both of one key

RESERVED = {name for names in READ.values() for name in names} | {"raw_task", LANGUAGE}

MARK = "imported.json"  # what a folder's pictures are of


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    Attributes:
        path: The manifest.
        rows: Number of rows in it.
        columns: The data set's column that each of the manifest's was read from.
        passed_over: Its columns of pictures that were not.
        problems: What was wrong with rows that were left out.
        listed: The file that lists these; None without any.
    """

    path: Path
    rows: int
    columns: dict[str, str]
    passed_over: list[str]
    problems: list[Problem]
    listed: Path | None


# Long: a third of it says what its arguments are.
def import_dataset(
    folder: Path,
    out: Path,
    split: str = "train",
    task: str | None = None,
    on_bad_row: str = "skip",
    max_bad_rows: int | None = None,
) -> Imported:
    """Writes a data set saved by `save_to_disk` as a manifest with PNGs beside it; a stopped import goes on.

    Args:
        folder: The data set; a column of source pictures may hold lists of them, and one of prompts lists of wordings,
            of which the first is taken and the others are columns prompt_2 and so on. OmniEdit's and GEdit-Bench's
            columns are known. Further columns of text are kept, for what sources are asked with.
        out: Folder of the manifest and the pictures; pictures that are there already are kept.
        split: Of a data set with several.
        task: Of every row; what the data set says is then kept as raw_task.
        on_bad_row: "skip" leaves bad rows out and lists them beside the manifest, "refuse" names them and writes none.
        max_bad_rows: How many may be left out; any number if not given.

    Returns:
        The manifest, and what was left out of it.

    Raises:
        UserError: The folder is no data set, or has no prompts, pictures or task; bad rows may not be left out; or
            `out` holds another data set's.
    """
    rows, bad_rows = _open(folder, split), BadRows(on_bad_row, max_bad_rows)
    found = {column: _find(column, rows.features) for column in COLUMNS}
    if not found["prompt"]:
        names = ", ".join(COLUMNS["prompt"])
        raise UserError(f"{folder} has no column of prompts ({names}); it has {', '.join(rows.column_names)}")
    if not found["task"] and not task:
        raise UserError(f"{folder} has no column task; say what all of its rows teach by --task")
    task_names = getattr(rows.features.get(found["task"] or ""), "names", None)  # of a column of class numbers
    _mark(out, {"data_set": str(folder.resolve()), "split": split, "fingerprint": rows._fingerprint})
    kept = [name for name, kind in rows.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    kept = [name for name in kept if name not in RESERVED and name not in found.values()]
    lines, problems, ids = [], [], {}
    stored = rows.with_format("arrow")  # pictures as they were stored, so that each can be refused on its own
    for i in bar(range(len(rows)), "rows"):
        try:
            part = stored[i : i + 1]
            part.validate(full=True)  # damaged offsets would be read as addresses
            (row,) = part.to_pylist()
        except Exception as error:  # of many kinds, by the bytes of the file that are damaged
            problems.append(Problem(i, f"cannot be read ({error}); copy the data set again", "row"))
            continue
        record = {"id": row[found["id"]] if found["id"] else f"{split}-{i}"}
        record |= _task(row[found["task"]] if found["task"] else None, task, task_names)
        record |= {name: row[name] for name in kept if row[name]} | _wordings(row[found["prompt"]])
        if language := row.get(LANGUAGE):
            record |= {"language": language, "id": f"{record['id']}-{language}"}
        try:
            _check_texts(record, ids, i)
            for column in ("source_image", "target_image"):
                if found[column]:
                    record |= _pictures(column, row[found[column]], out, i)
        except ValueError as error:
            problems.append(Problem(i, f"{record['id']}: {error}", "row"))
        else:
            lines.append(json.dumps(record))
    bad_rows.settle(folder, problems, len(lines))
    if not lines:
        raise UserError(f"{folder} has no rows in its split {split!r}")
    path = out / "manifest.jsonl"
    write_list(path, folder, problems)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    read = {column: name for column, name in found.items() if name}
    passed_over = [name for name in _with_pictures(rows.features) if name not in read.values()]
    return Imported(path, len(lines), read, passed_over, problems, list_path(path) if problems else None)


def _find(column: str, features: Mapping) -> str | None:
    """Returns the data set's column that one of the manifest's is read from; one that holds pictures goes first."""
    names = [name for name in COLUMNS[column] if name in features]
    if column.endswith("_image"):
        called = [name for name in names if "image" in name or "img" in name]  # "source" may be where a row comes from
        pictures = _with_pictures(features)
        names = [*[name for name in names if name in pictures], *called]
    return next(iter(names), None)


def _with_pictures(features: Mapping) -> list[str]:
    """Lists the columns that hold pictures, or lists of them."""
    return [name for name, feature in features.items() if "Image(" in repr(feature)]


def _task(stored: object, wanted: str | None, names: list[str] | None) -> dict:
    """Makes columns of a row's task, and of what the user calls it; names: of class numbers."""
    if names and type(stored) is int and 0 <= stored < len(names):
        stored = names[stored]
    if wanted is None:
        return {"task": stored}
    return {"task": wanted} | ({"raw_task": stored} if isinstance(stored, str) and stored else {})


def _wordings(prompt: object) -> dict:
    """Makes columns of a row's prompt, or of its list of wordings."""
    if not isinstance(prompt, list):
        return {"prompt": prompt}
    first, *others = [text for text in prompt if text] or [None]
    return {"prompt": first} | {f"prompt_{n}": text for n, text in enumerate(others, 2)}


def _open(folder: Path, split: str):
    """Opens a data set; a UserError if it is none, or has not that split."""
    try:
        from datasets import DatasetDict, load_from_disk
    except ModuleNotFoundError:
        raise UserError("reading a Hugging Face data set needs datasets; pip install datasets") from None
    try:
        rows = load_from_disk(str(folder))
    except Exception as error:  # of many kinds, by the file that is damaged
        raise UserError(f"{folder} is not a data set written by save_to_disk ({error})") from None
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise UserError(f"{folder} has no split {split!r}; there are {', '.join(rows)}")
        rows = rows[split]
    return rows


def _mark(out: Path, now: dict) -> None:
    """Notes what is imported into a folder: pictures there are kept by their names, so it must not be anything else."""
    path = out / MARK
    if path.is_file():
        try:
            before = parse_json(read_text(path))
            same = {**before, "data_set": now["data_set"]} == now  # it may have moved
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; import into another folder") from None
        if not same:
            raise UserError(
                f"{out} holds pictures of split {before.get('split')!r} of {before.get('data_set')}, or of what it was "
                "then; import into another folder, or remove this one"
            )
    elif (out / "manifest.jsonl").exists():
        raise UserError(f"{out / 'manifest.jsonl'} is there already; import into another folder, or remove it")
    write_atomic(path, (json.dumps(now, indent=1) + "\n").encode())


def _check_texts(record: dict, ids: dict[str, int], row: int) -> None:
    """Checks a row's id, task and prompt as a manifest's reader does, and makes its id a text; a ValueError if not."""
    if type(record["id"]) in (int, str):
        record["id"] = str(record["id"])
    for column in ("id", "task", "prompt"):
        value = record[column]
        if not isinstance(value, str):
            raise ValueError(f"{column} is a {type(value).__name__}, not text")
        if not value.strip():
            raise ValueError(f"{column} is empty")
    if (first := ids.setdefault(record["id"].strip(), row)) != row:
        raise ValueError(f"its id is that of row {first} too")


def _pictures(column: str, stored: object, out: Path, row: int) -> dict:
    """Writes a row's pictures of a column; returns {column: names}, nothing if there is none."""
    name = f"{row:08d}-{column.removesuffix('_image')}"
    if stored is None:
        return {}
    if isinstance(stored, list) and column == "source_image":
        return {column: [_write_picture(column, one, out, f"{name}-{n}.png") for n, one in enumerate(stored)]}
    return {column: _write_picture(column, stored, out, f"{name}.png")}


def _write_picture(column: str, stored: object, out: Path, name: str) -> str:
    """Writes a picture where it is not there yet; returns its name, relative to the manifest."""
    if not isinstance(stored, dict) or "bytes" not in stored:
        raise ValueError(
            f"{column} is a {type(stored).__name__}, no picture; cast its column to datasets.Image() first"
        )
    if stored["bytes"] is None:
        raise ValueError(
            f"{column} names a file, {stored.get('path')}, and holds no picture; save the data set with it"
        )
    path = out / "images" / name
    if not path.is_file():
        try:
            picture = decode_picture(io.BytesIO(stored["bytes"]))
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from None
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        write_atomic(path, buffer.getvalue())
    return f"images/{name}"
