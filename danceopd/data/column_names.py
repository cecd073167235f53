"""Finds columns of a manifest that stand for another one: under a name that is not read they would be passed over."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache

READ = {  # the columns that are read, by what a row lacks where none of them holds something
    "id": ("id", "uid"),
    "task": ("task", "capability"),
    "prompt": ("prompt", "caption_dict"),
    "source_image": ("source_image",),
    "target_image": ("target_image", "edited_image"),
}

OTHERWISE = {  # as other tools call them
    "prompt": ("text", "caption", "instruction", "edit_instruction", "edit_prompt", "edited_prompt"),
    "source_image": ("source", "input", "input_image", "src_img", "image_src", "control_image", "reference_image"),
    "target_image": ("target", "output", "output_image", "edited", "edited_img", "image", "image_path", "file_name"),
}

_KNOWN = {name: wanted for wanted, names in READ.items() for name in names}


@lru_cache(maxsize=1024)  # a million rows have the same columns
def meant(column: str) -> str | None:
    """Returns the column that another seems to stand for, of READ; None for one that is read, or like none."""
    if column in _KNOWN:
        return None
    plain = column.strip().lower().replace("-", "_").replace(" ", "_")
    for wanted, names in OTHERWISE.items():
        if plain in names:
            return wanted
    near = get_close_matches(plain, _KNOWN, n=1, cutoff=0.8)
    return _KNOWN[near[0]] if near else None


def misnamed(record: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Finds what a row says under names that are not read, where it says it under no name that is.

    Args:
        record: The row, by column.

    Returns:
        The names, each with that of the column that it seems to stand for.
    """
    found = [(name, wanted) for name in record if name and _fits(record[name], wanted := meant(name))]
    return tuple((name, wanted) for name, wanted in found if not any(record.get(read) for read in READ[wanted]))


def _fits(value: object, wanted: str | None) -> bool:
    """Tells whether a value may be what a column is read for: a picture's path is a list of them, or has a suffix."""
    if not wanted or not value:
        return False
    return not wanted.endswith("_image") or isinstance(value, list) or "." in str(value)


def column_notes(rows: Sequence) -> list[str]:
    """Says which columns of a manifest's rows are passed over, a line for each.

    Args:
        rows: Each with its `misnamed`.

    Returns:
        "36 of 36 rows have a column 'target', which is not read; rename it to 'target_image' if it is that".
    """
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for pair in row.misnamed:
            counts[pair] = counts.get(pair, 0) + 1
    return [
        f"{count} of {len(rows)} rows have a column {name!r}, which is not read; rename it to {wanted!r} if it is that"
        for (name, wanted), count in counts.items()
    ]
