"""A user's own data: a manifest (JSONL or CSV) of prompts and picture files, checked line by line.

Columns: id (or uid), task (or capability), prompt, source_image, target_image; others are ignored. Every row needs
a task and a prompt. A row without an id goes by its line. source_image is a path or, for several reference pictures,
a list of them in their order; a CSV cell holds that list as JSON: ["a.png", "b.png"]. Picture paths are relative to the
manifest's folder, or to the `root` given, and may not leave it: a shared manifest must not read its reader's files.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from danceopd.errors import UserError

SUFFIXES = (".jsonl", ".csv")
# Only plain raster formats: Pillow would hand others (EPS) to an external interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64_000_000
CACHE_BYTES = 256 * 2**20  # of decoded pictures that each data set keeps
_SHOWN = 5  # problems or lines named in one error message


@dataclass(frozen=True)
class Row:
    """One good line of a manifest; pictures are resolved paths of files that exist. target_image: or None."""

    line: int
    id: str
    capability: str
    prompt: str
    source_images: tuple[Path, ...]
    target_image: Path | None

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The sources, then the target."""
        return self.source_images + ((self.target_image,) if self.target_image else ())


@dataclass(frozen=True)
class Problem:
    """What is wrong with one line of a manifest, and what to do about it."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


def hint(name: str, known: Iterable[str]) -> str:
    """ "known: edit, t2i; did you mean edit?" for the error about an unknown name."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"known: {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")


def read_manifest(
    path: str | Path,
    root: str | Path | None = None,
    *,
    needs_source: Iterable[str] = (),
    decode: bool = False,
) -> tuple[list[Row], list[Problem]]:
    """Read every line; return the good rows, and all problems in order of line.

    Rows of a capability in `needs_source` must have a source picture. With `decode` every picture is opened
    and decoded to its end; without, it only has to be there.
    Raises FileNotFoundError or UserError if the file as a whole is of no use: missing, empty, neither
    .jsonl nor .csv, not UTF-8.
    """
    path, needs_source = Path(path), frozenset(needs_source)
    text = _read_text(path)
    root = path.parent if root is None else Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"the folder of pictures {root} is not there; give the one that paths start from")
    root = root.resolve()
    records = _json_records(text) if path.suffix.lower() == ".jsonl" else _csv_records(text)
    rows, problems = [], []
    first_line: dict[str, int] = {}
    damage: dict[Path, str] = {}  # so that a picture shared by many rows is decoded once
    for line, record in records:
        if isinstance(record, str):
            problems.append(Problem(line, record))
            continue
        row, messages = _parse_row(line, record, root)
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
    """All problems of a manifest and its pictures, every one of which is decoded; raises as read_manifest."""
    return read_manifest(path, root, needs_source=needs_source, decode=True)[1]


def _read_text(path: Path) -> str:
    """The manifest's text; raises FileNotFoundError or UserError with what to do."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the manifest in it (a {' or '.join(SUFFIXES)} file)")
    if not path.is_file():
        raise FileNotFoundError(f"no manifest at {path}; check the path")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is neither JSONL nor CSV by its name; it must end in {' or '.join(SUFFIXES)}")
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
    """The line and object of each line that is not blank, or a message in the object's place."""
    for line, content in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            yield line, f"not JSON ({error}); write one object on each line"
            continue
        yield line, record if isinstance(record, dict) else "not a JSON object; write {...} on each line"


def _csv_records(text: str) -> Iterator[tuple[int, dict | str]]:
    """The first line and cells by column of each CSV row, or a message in the cells' place."""
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
            yield line, f"{len(cells)} cells under {len(header)} columns; quote cells that hold a comma"
        else:
            record = dict(zip(header, cells, strict=False))
            sources = record.get("source_image", "").strip()
            if sources.startswith("[") and sources.endswith("]"):
                try:
                    record["source_image"] = json.loads(sources)
                except (ValueError, RecursionError) as error:
                    yield line, f'source_image is not JSON ({error}); write a list as ["a.png", "b.png"]'
                    continue
            yield line, record


def _header_problem(header: list[str]) -> str:
    """What keeps every row of a CSV from being read, or ""."""
    found = f"the header has {', '.join(header)}"
    if repeated := sorted({name for name in header if name and header.count(name) > 1}):
        return f"columns named twice: {', '.join(repeated)}"
    if "prompt" not in header:
        return f"no column 'prompt' ({found}); columns are separated by commas"
    if "task" not in header and "capability" not in header:
        return f"no column 'task' or 'capability' ({found})"
    return ""


def _parse_row(line: int, record: dict, root: Path) -> tuple[Row, list[str]]:
    """The row as far as it can be read, and what is wrong with it."""
    messages: list[str] = []

    def text(column: str) -> str | None:
        """The stripped cell, "" if there is none, None if it is reported as no text."""
        value = record.get(column)
        if column in ("id", "uid") and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is None or isinstance(value, str):
            value = (value or "").strip()
            if value.encode("utf-8", "ignore").decode() == value:
                return value
            messages.append(f"{column} holds half a character (a lone surrogate)")
        else:
            messages.append(f"{column} is {json.dumps(value)[:40]}, not text; put it in quotes")
        return None

    def found(column: str, name: str) -> Path | None:
        path, message = _find_picture(name, root)
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

    task, capability, prompt = text("task"), text("capability"), text("prompt")
    if task and capability and task != capability:
        messages.append(f"task {task!r} and capability {capability!r} differ; give one of them")
    if task == "" and capability == "":
        messages.append("no task; name the capability that the row teaches")
    if prompt == "":
        messages.append("no prompt; describe the picture or the edit")
    row = Row(
        line=line,
        id=text("id") or text("uid") or f"line {line}",
        capability=task or capability or "",
        prompt=prompt or "",
        source_images=pictures("source_image"),
        target_image=picture("target_image"),
    )
    return row, messages


def _find_picture(name: str, root: Path) -> tuple[Path | None, str]:
    """The file that a picture path stands for; or None, and why there is none."""
    outside = f"leads out of the folder {root}; move the picture into it"
    try:
        if Path(name).is_absolute():
            return None, f"is an absolute path; write it relative to {root}"
        path = (root / name).resolve()  # follows links, so that none leads out unnoticed
        if not path.is_relative_to(root):
            return None, outside
        if not path.is_file():
            return None, "is not there (or not a file)"
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, a ring of links
        return None, f"is not a path that can be opened ({type(error).__name__}: {error})"
    return path, ""


def _damage(path: Path) -> str:
    """Why a picture can't be used, or ""."""
    try:
        decode_picture(path)
    except ValueError as error:
        return str(error)
    return ""


def decode_picture(path: Path) -> Image.Image:
    """Decode a picture of any mode, turned upright, as 8-bit RGB; transparency becomes white.

    Raises ValueError with the reason if it can't be read to its end or has more than MAX_PIXELS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} is over {MAX_PIXELS / 1e6:.0f} megapixels")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"not a picture, or damaged (readable are {', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"far over {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller") from error
    except Exception as error:  # on damaged files decoders raise almost anything
        raise ValueError(f"can't be decoded ({error}); save it again") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; raises ValueError for pixels whose range isn't known."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of unknown range")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8 instead of scaling them
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square, resized to size x size; a picture of that size already comes back as it is."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def load_picture(path: Path, size: int) -> torch.Tensor:
    """One picture as a field takes it: [3, size, size] float32 in [-1, 1]. Raises UserError if it can't be read."""
    if not path.is_file():
        raise UserError(f"no picture at {path}")
    try:
        image = fit_square(decode_picture(path), size)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return _pixels(image) / 127.5 - 1


def _pixels(image: Image.Image) -> torch.Tensor:
    """[3, S, S] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class ManifestData:
    """The rows of one capability in a manifest; pictures are decoded when asked for.

    Raises what read_manifest does, and UserError if the manifest has problems or no row of the
    capability, or if only some of its rows have a source picture, or one has several.
    """

    def __init__(self, path: str | Path, capability: str, image_size: int, root: str | Path | None = None) -> None:
        self.path, self.capability, self.image_size = Path(path), capability, image_size
        rows, problems = read_manifest(path, root)
        if problems:
            raise UserError(f"{path} has {len(problems)} problem(s): {_first(problems, '; ')}")
        self.rows = [row for row in rows if row.capability == capability]
        if not self.rows:
            raise UserError(
                f"{path} has no rows of {capability!r}; {hint(capability, {row.capability for row in rows})}"
            )
        if several := [row.line for row in self.rows if len(row.source_images) > 1]:
            raise UserError(
                f"{self.path}: {len(several)} rows of {self.capability!r} have several source pictures "
                f"(line {_first(several, ', ')}); the embedded network takes one"
            )
        self.has_source = self._all_or_none("source_image")
        self._cache: dict[Path, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def prompts(self, indices: list[int]) -> list[str]:
        return [self.rows[i].prompt for i in indices]

    def sources(self, indices: list[int]) -> torch.Tensor | None:
        """[n, 3, S, S] float32 in [-1, 1], or None without sources; UserError for a damaged picture."""
        return self._pictures("source_image", indices) if self.has_source else None

    def targets(self, indices: list[int]) -> torch.Tensor | None:
        """[n, 3, S, S] float32 in [-1, 1], or None without targets; UserError for a damaged picture.

        On-policy training asks for none, so only here is it an error that some rows have one and some not.
        """
        return self._pictures("target_image", indices) if self._all_or_none("target_image") else None

    def _all_or_none(self, column: str) -> bool:
        """Whether the rows have this picture; raises UserError where some have it and some don't."""
        without = [row.line for row in self.rows if self._path(row, column) is None]
        if without and len(without) < len(self.rows):
            raise UserError(
                f"{self.path}: {len(without)} of {len(self.rows)} rows of {self.capability!r} have no "
                f"{column} (line {_first(without, ', ')}); give all of them one, or none"
            )
        return not without

    def _pictures(self, column: str, indices: list[int]) -> torch.Tensor:
        batch = torch.empty(len(indices), 3, self.image_size, self.image_size)
        for place, index in enumerate(indices):
            batch[place] = self._load(self.rows[index], column)
        return batch / 127.5 - 1

    @staticmethod
    def _path(row: Row, column: str) -> Path | None:
        return next(iter(row.source_images), None) if column == "source_image" else row.target_image

    def _load(self, row: Row, column: str) -> torch.Tensor:
        """One picture as [3, S, S] uint8, from memory if it was kept there."""
        path = self._path(row, column)
        if path in self._cache:
            return self._cache[path]
        try:
            image = fit_square(decode_picture(path), self.image_size)
        except ValueError as error:
            raise UserError(f"{self.path}, line {row.line}: {column} {path}: {error}") from error
        pixels = _pixels(image)
        if (len(self._cache) + 1) * pixels.numel() <= CACHE_BYTES:
            self._cache[path] = pixels
        return pixels


def _first(items: list, separator: str) -> str:
    """The first few items, and how many more there are."""
    shown = separator.join(str(item) for item in items[:_SHOWN])
    return shown + (f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
