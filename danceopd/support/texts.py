"""Reads text files and the JSON in them: no byte-order mark is kept, and a line is what ends in a newline.

And fills texts in: {name} in braces is a row's column of that name; and writes times.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter

from danceopd.support.errors import UserError
from danceopd.support.paths import near_path

PROMPT = "{prompt}"  # a text that is a row's prompt, as it is

NAMED = 3  # names that `some` writes out


def read_text(path: Path, what: str = "file") -> str:
    """Reads a text file in UTF-8, without its byte-order mark; line ends become newlines.

    Args:
        path: The file.
        what: What a message calls it.

    Raises:
        UserError: It is not there, is no file, cannot be read, or is not UTF-8; with the line where it is not.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the {what} itself")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is no {what} {path}{near_path(path)}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, wide = data.count(b"\n", 0, error.start) + 1, data[:2] in (b"\xff\xfe", b"\xfe\xff")
        found = "begins as UTF-16 does" if wide else f"is not UTF-8 (line {line})"
        raise UserError(f"{path} {found}; save it in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def many(count: int, one: str, more: str = "") -> str:
    """Writes a number of things.

    Args:
        count: Their number.
        one: What one of them is called.
        more: What several are called; with an s behind it if not given.

    Returns:
        "1 row", "3 rows", "12,000 rows".
    """
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def finite(value: object) -> float | None:
    """Returns a value of a JSON file as a float, or None where it is no number or none that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Numbers the lines of a text from 1, leaving out blank ones.

    `str.splitlines` would also cut at U+2028, U+0085, form feeds and others, which may stand inside a prompt. A line is
    cut out when its turn comes: a million of them take as much memory as the text.
    """
    begin, number = 0, 0
    while begin < len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        line, begin, number = text[begin:end], end + 1, number + 1
        if line.strip():
            yield number, line


def parse_json(text: str | bytes) -> object:
    """Reads one JSON value.

    Raises:
        ValueError: It is not JSON, nests too deep, has a key twice in an object, of which one would be lost, or half a
            character in a text, which no file takes.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        found = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    return found


def parse_object(text: str | bytes) -> dict:
    """Reads one JSON object; raises as parse_json, also for any other value."""
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def read_object(path: Path, mend: str) -> dict:
    """Reads a file that is one JSON object.

    Args:
        path: The file.
        mend: What a message tells to do where it is damaged.

    Raises:
        UserError: It cannot be read, or is no such file.
    """
    text = read_text(path)
    try:
        return parse_object(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); {mend}") from None


def _once(pairs: list[tuple[str, object]]) -> dict:
    found = {sys.intern(key): value for key, value in pairs}  # a million rows have the same keys
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)  # made once, for files of a million lines


def columns_of(text: str) -> list[str]:
    """Lists the columns that a text takes from a row, each once.

    Raises:
        ValueError: Its braces are not as they should be.
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}; a column stands as {{prompt}}, a brace itself is doubled") from None
    for _, name, rule, conversion in parts:
        if name is not None and (not name.isidentifier() or rule or conversion):
            raise ValueError(f"{text!r}: {{{name}}} is no column; it stands as {{prompt}}, a brace itself is doubled")
    return list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))


def filled(text: str, columns: Mapping[str, str]) -> str:
    """Fills a row's columns into a text.

    Raises:
        ValueError: The row lacks a column, or has nothing in it.
    """
    for name in columns_of(text):
        if not columns.get(name):
            raise ValueError(f"no {name!r}, which the text {text!r} takes from every row")
    return text.format_map(columns)


def format_seconds(seconds: float) -> str:
    """Writes a time with the unit that suits it: "35 µs", "12 ms", "1.2 s", "6.5 min", "2.1 h", "3.4 days"."""
    units = (("days", 172_800, 86_400), ("h", 5_400, 3_600), ("min", 90, 60), ("s", 1, 1), ("ms", 1e-3, 1e-3))
    unit, size = next(((name, size) for name, least, size in units if seconds >= least), ("µs", 1e-6))
    value = seconds / size
    return f"{value:.0f} {unit}" if value >= 10 or not value else f"{value:.1f} {unit}"


def excerpt(text: str, most: int = 60) -> str:
    """Returns a text, or its beginning where it has more characters than a line takes."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def some(names: list[str]) -> str:
    """Writes the first few of some names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
