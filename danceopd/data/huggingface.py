"""A Hugging Face datasets folder on disk, written out as pictures and a manifest."""

import json
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic

COLUMNS = {  # a manifest's column: the names it is looked for by, the first that is there
    "id": ("id", "uid"),
    "task": ("task", "capability"),
    "prompt": ("prompt", "text", "caption", "instruction"),
    "source_image": ("source_image", "input_image"),
    "target_image": ("target_image", "edited_image", "image"),
}


def import_dataset(folder: Path, out: Path, split: str = "train", task: str | None = None) -> tuple[Path, int]:
    """Writes a data set saved by `save_to_disk` as a manifest with PNGs beside it; a stopped import goes on.

    Args:
        folder: The data set; a column of source pictures may hold lists of them.
        out: Folder of the manifest and the pictures; pictures that are there already are kept.
        split: Of a data set with several.
        task: Of every row, where the data set has no such column.

    Returns:
        The manifest's path, and the number of rows.

    Raises:
        UserError: The folder is no data set, or has no prompts, pictures or task.
    """
    try:
        from datasets import DatasetDict, load_from_disk
    except ModuleNotFoundError:
        raise UserError("reading a Hugging Face data set needs datasets; pip install datasets") from None
    try:
        rows = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise UserError(f"{folder} is not a data set written by save_to_disk ({error})") from None
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise UserError(f"{folder} has no split {split!r}; there are {', '.join(rows)}")
        rows = rows[split]
    found = {column: next((n for n in names if n in rows.column_names), None) for column, names in COLUMNS.items()}
    if not found["prompt"]:
        names = ", ".join(COLUMNS["prompt"])
        raise UserError(f"{folder} has no column of prompts ({names}); it has {', '.join(rows.column_names)}")
    if not found["task"] and not task:
        raise UserError(f"{folder} has no column task; say what all of its rows teach by --task")
    lines = []
    for i, row in enumerate(tqdm(rows, "rows")):
        record = {"id": str(row[found["id"]]) if found["id"] else f"{split}-{i}", "task": task or row[found["task"]]}
        record["prompt"] = row[found["prompt"]]
        for column in ("source_image", "target_image"):
            picture, name = row[found[column]] if found[column] else None, f"{i:08d}-{column.removesuffix('_image')}"
            if isinstance(picture, list) and column == "source_image":
                record[column] = [_write_picture(p, out, f"{name}-{n}.png", folder) for n, p in enumerate(picture)]
            elif picture is not None:
                record[column] = _write_picture(picture, out, f"{name}.png", folder)
        lines.append(json.dumps(record))
    path = out / "manifest.jsonl"
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path, len(lines)


def _write_picture(picture, out: Path, name: str, folder: Path) -> str:
    """Writes a picture where it is not there yet; returns its name, relative to the manifest."""
    if not isinstance(picture, Image.Image):
        raise UserError(f"{folder}: a picture is a {type(picture).__name__}; cast its column to datasets.Image() first")
    path = out / "images" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        picture.save(temporary, format="PNG")
        temporary.replace(path)
    return f"images/{name}"
