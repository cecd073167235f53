"""Reads GEdit-Bench (arXiv 2504.17761).

Edits lie in the official layout METHOD/fullset/TASK/LANGUAGE/KEY.png, as the benchmark's own script reads it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.support.errors import UserError

# The benchmark's own names of its eleven kinds, and those that the paper's average is over.
KINDS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)

PAPER_KINDS = ("subject-add", "subject-replace", "background_change", "style_change", "color_alter", "subject-remove")

LANGUAGES = ("en", "cn")

SUBSETS = ("fullset", "intersection")

COLUMNS = ("key", "task_type", "instruction", "instruction_language", "input_image")

INTERSECTION = "Intersection_exist"  # the column of rows that are in the smaller subset too


@dataclass(frozen=True)
class Row:
    """One edit of the benchmark.

    Attributes:
        key, kind, language, instruction: As the data set has them.
        intersection: Whether it is in the smaller subset; None where no column tells.
        index: Its place in the data set.
    """

    key: str
    kind: str
    language: str
    instruction: str
    intersection: bool | None
    index: int


@dataclass(frozen=True)
class Benchmark:
    """The rows chosen, and the data set that holds their pictures."""

    rows: list[Row]
    data: Any

    def picture(self, row: Row, raw: bool = False) -> Image.Image:
        """Reads the picture to edit as RGB; a UserError if it cannot be decoded.

        Args:
            row: Whose picture.
            raw: Whether it is wanted as it was before the benchmark's authors resized it, where that is there.
        """
        column = "input_image_raw" if raw and "input_image_raw" in self.data.column_names else "input_image"
        try:
            picture = self.data.select_columns([column])[row.index][column]
            return picture.convert("RGB")
        except Exception as error:  # on damaged files decoders raise almost anything
            raise UserError(f"the {column} of {row.key} cannot be read ({error}); copy the data set again") from None


def kinds_of(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the benchmark's names of kinds, written with - or _; "paper" and "all" are the six and the eleven."""
    known = {kind.replace("_", "-"): (kind,) for kind in KINDS} | {"paper": PAPER_KINDS, "all": KINDS}
    found: list[str] = []
    for name in names:
        if name.replace("_", "-") not in known:
            raise UserError(f"GEdit-Bench has no kind {name!r}; there are paper, all, {', '.join(KINDS)}")
        found += known[name.replace("_", "-")]
    return tuple(dict.fromkeys(found))


def read_benchmark(
    folder: Path, kinds: Sequence[str] = PAPER_KINDS, languages: Sequence[str] = ("en",), subset: str = "fullset"
) -> Benchmark:
    """Reads the rows of these kinds, languages and subset.

    Args:
        folder: A data set written by save_to_disk, or a folder of parquet files.
        kinds: The benchmark's names, as kinds_of gives them.
        languages: Of the instructions: "en", "cn".
        subset: "fullset" or "intersection".

    Raises:
        UserError: The folder is no such data set, lacks columns, has rows that name no place of the layout or the same
            one twice, or has no row of a kind in one of the languages.
    """
    data = load_data(folder)
    if missing := [column for column in COLUMNS if column not in data.column_names]:
        raise UserError(f"{folder} lacks the columns {', '.join(missing)}; it has {', '.join(data.column_names)}")
    if subset == "intersection" and INTERSECTION not in data.column_names:
        raise UserError(f"{folder} has no column {INTERSECTION}, which says what the intersection subset is")
    names = ["key", "task_type", "instruction_language", "instruction", INTERSECTION]
    texts = data.select_columns([name for name in names if name in data.column_names])[:]
    rows, places = [], set()
    for i in range(len(data)):
        values = {name: column[i] for name, column in texts.items()}
        key, kind, language, text = (str(values[name]) for name in names[:4])
        if kind not in KINDS or language not in LANGUAGES:
            raise UserError(
                f"{folder}: row {i} is of task_type {kind!r} and language {language!r}, which GEdit-Bench has not"
            )
        if not re.fullmatch(r"[\w.-]+", key) or key.startswith("."):
            raise UserError(f"{folder}: the key {key!r} of row {i} is no file's name")
        if (kind, language, key) in places:
            raise UserError(f"{folder}: two rows have the key {key} in {kind}/{language}")
        places.add((kind, language, key))
        inside = None if values.get(INTERSECTION) is None else bool(values[INTERSECTION])
        if kind in kinds and language in languages and (subset == "fullset" or inside):
            rows.append(Row(key, kind, language, text, inside, i))
    for language in languages:
        there = {row.kind for row in rows if row.language == language}
        if none := [kind for kind in kinds if kind not in there]:
            raise UserError(f"{folder} has no rows of {', '.join(none)} in {language} ({subset}); choose other kinds")
    return Benchmark(rows, data)


def load_data(folder: Path):
    """Opens the data set in a folder, its pictures to be decoded; a UserError for a folder that is none."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("reading GEdit-Bench needs datasets; pip install 'danceopd[datasets]'") from None
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give GEdit-Bench as save_to_disk wrote it, or its parquet files")
    try:
        if parquet := sorted(str(path) for path in folder.rglob("*.parquet")):
            data = datasets.Dataset.from_parquet(parquet)
        else:
            data = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds, by the file that is damaged
        raise UserError(f"{folder} is no data set of save_to_disk, nor of parquet files ({error})") from None
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UserError(f"{folder} has no split train, which GEdit-Bench is in; there are {', '.join(data)}")
        data = data["train"]
    for column in ("input_image", "input_image_raw"):
        if column in data.column_names and not isinstance(data.features[column], datasets.Image):
            try:
                data = data.cast_column(column, datasets.Image())
            except Exception:
                raise UserError(f"{folder}: the column {column} holds no pictures") from None
    return data
