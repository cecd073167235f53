"""What becomes of rows that cannot be used: each is named with its file, number and reason, and refused or left out."""

from dataclasses import dataclass
from pathlib import Path

from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.texts import many

ON_BAD_ROW = ("skip", "refuse")

SHOWN = 20  # problems in one message


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row, and what to do about it.

    Attributes:
        line: Its line in a manifest, or its number in a data set.
        message: What was seen.
        unit: What `line` counts.
    """

    line: int
    message: str
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.unit} {self.line}: {self.message}"


@dataclass(frozen=True)
class BadRows:
    """What is done about bad rows.

    Attributes:
        action: "skip" leaves them out, "refuse" ends with a list of them all.
        limit: With "skip", how many may be left out; any number if not given.
    """

    action: str = "skip"
    limit: int | None = None

    def __post_init__(self):
        if self.action not in ON_BAD_ROW:
            raise UserError(f"on_bad_row {self.action!r} is not valid; valid are {', '.join(ON_BAD_ROW)}")

    def settle(self, file: Path, problems: list[Problem], good: int) -> None:
        """Goes on where the bad rows of a file may be left out.

        Args:
            file: What the rows are in.
            problems: Of its rows.
            good: Number of rows that can be used.

        Raises:
            UserError: They may not, or no row is left; with the first of them.
        """
        bad = len({problem.line for problem in problems})
        if not problems:
            return
        if not good:
            head = f"no row of {file} can be used:"
        elif self.action == "refuse":
            head = (
                f"{file} has problems in {bad} of {many(bad + good, 'row')}; mend them, or leave them out by "
                "on_bad_row: skip:"
            )
        elif self.limit is not None and bad > self.limit:
            head = (
                f"{file} has {many(bad, 'bad row')} of {bad + good}, more than the {self.limit} that may be left out:"
            )
        else:
            return
        raise UserError("\n  ".join([head, *shown(problems)]))


def shown(problems: list[Problem], where: str = "") -> list[str]:
    """Returns the first problems, a line each, and how many more there are; where: where all of them are."""
    more = len(problems) - SHOWN
    return [*map(str, problems[:SHOWN]), *([f"and {more} more{where}"] if more > 0 else [])]


def list_path(index: Path) -> Path:
    """Returns the file beside an index that lists what was left out of it."""
    return index.with_name(f"{index.stem}.left_out.txt")


def write_list(index: Path, file: Path, problems: list[Problem]) -> None:
    """Writes the list of a file's bad rows beside the index of its good ones; without any, removes an older list."""
    path = list_path(index)
    if problems:
        write_atomic(path, "".join(f"{file}, {problem}\n" for problem in problems).encode("utf-8", "replace"))
    else:
        path.unlink(missing_ok=True)
