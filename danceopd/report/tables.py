"""Makes the tables of a report, for the page, as text and as markdown."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from danceopd.report.names import DASH, EDIT_SOURCE, KINDS, T2I_SOURCE, TASKS, _number, label, percent


def _row(results: dict, name: str) -> dict | None:
    return next((row for row in results.get("rows", ()) if row.get("name") == name), None)


def _share(results: dict, row: dict | None, source: str, path: Sequence[str]) -> float | None:
    """Returns the row's figure over the source row's; None where either is absent or the source's is not above 0."""
    value, level = _number(row, *path), _number(_row(results, source), *path)
    return value / level if value is not None and level is not None and level > 0 else None


def shares(results: dict, row: dict | None) -> dict[str, float | None]:
    """Returns {"t2i": the row's share of the T2I source's overall, "edit": of the Edit source's average}."""
    return {
        "t2i": _share(results, row, T2I_SOURCE, ("geneval", "overall")),
        "edit": _share(results, row, EDIT_SOURCE, ("gedit", "average")),
    }


def _bars(results: dict) -> dict[str, float]:
    return {"t2i": 0.95, "edit": 0.95} | results.get("bars", {})


def reaches_bars(results: dict, row: dict | None) -> bool:
    """Returns whether a row reaches results["bars"] (0.95 unless given) of both sources."""
    bars = _bars(results)
    return all(share is not None and share >= bars[key] for key, share in shares(results, row).items())


@dataclass(frozen=True)
class Column:
    """One column of figures of a row of results: its value, the value's error where it has one, and how both are
    printed.
    """

    title: str
    value: Callable[[dict], float | None]
    form: Callable[[float | None], str]
    error: Callable[[dict], float | None] = lambda row: None
    group: str = ""
    ranked: bool = True  # is the best value set in bold?


def _decimals(digits: int) -> Callable[[float | None], str]:
    return lambda value: DASH if value is None else f"{value:.{digits}f}"


_GENEVAL, _GEDIT = _decimals(3), _decimals(2)


def _at(*path: str) -> Callable[[dict], float | None]:
    return lambda row: _number(row, *path)


def _main_columns(results: dict) -> list[Column]:
    return [
        Column(
            "GenEval overall",
            _at("geneval", "overall"),
            _GENEVAL,
            _at("geneval", "standard_error"),
        ),
        Column("of T2I source", lambda row: shares(results, row)["t2i"], percent, ranked=False),
        Column("GEdit average", _at("gedit", "average"), _GEDIT, _at("gedit", "standard_error")),
        Column("of Edit source", lambda row: shares(results, row)["edit"], percent, ranked=False),
    ]


def _task_columns() -> list[Column]:
    return [
        *(Column(title, _at("geneval", key), _GENEVAL) for key, title in TASKS.items()),
        Column("Overall", _at("geneval", "overall"), _GENEVAL, _at("geneval", "standard_error")),
    ]


def _kind_columns() -> list[Column]:
    return [
        *(Column(title, _at("gedit", key), _GEDIT) for key, title in KINDS.items()),
        Column("Average", _at("gedit", "average"), _GEDIT, _at("gedit", "standard_error")),
    ]


def _held_out_columns() -> list[Column]:
    t2i, edit = ("geneval", "held_out"), ("gedit", "held_out")
    return [
        *(Column(TASKS[key], _at(*t2i, key), _GENEVAL, group="Text to image") for key in TASKS),
        Column("Overall", _at(*t2i, "overall"), _GENEVAL, _at(*t2i, "standard_error"), "Text to image"),
        *(Column(KINDS[key], _at(*edit, key), _GEDIT, group="Editing") for key in KINDS),
        Column("Average", _at(*edit, "average"), _GEDIT, _at(*edit, "standard_error"), "Editing"),
    ]


def _best(texts: Iterable[str]) -> str | None:
    """Returns the greatest printed figure: rows that print alike tie. None where fewer than two rows have one."""
    figures = [text for text in texts if text != DASH]
    return max(figures, key=float) if len(figures) > 1 else None


def _table(results: dict, columns: list[Column]) -> dict | None:
    """Returns what the page's table macro prints; columns without a figure are left out, None where all are."""
    rows = list(results.get("rows", ()))
    columns = [column for column in columns if any(column.value(row) is not None for row in rows)]
    if not columns:
        return None
    texts = [[column.form(column.value(row)) for row in rows] for column in columns]
    best = [_best(column_texts) if column.ranked else None for column, column_texts in zip(columns, texts, strict=True)]
    student = results.get("student", "danceopd")
    lines = []
    for i, row in enumerate(rows):
        cells = []
        for j, column in enumerate(columns):
            error, text = column.error(row), texts[j][i]
            cells.append(
                {
                    "text": text,
                    "error": None if error is None or text == DASH else column.form(error),
                    "best": text == best[j],
                }
            )
        lines.append(
            {
                "label": label(row.get("name", DASH)),
                "student": row.get("name") == student,
                "cells": cells,
                "reached": reaches_bars(results, row),
            }
        )
    groups = [
        {"title": title, "span": len(list(members))}
        for title, members in itertools.groupby(columns, key=lambda column: column.group)
    ]
    return {
        "titles": [column.title for column in columns],
        "groups": groups if any(group["title"] for group in groups) else [],
        "rows": lines,
    }


def _bar_title(results: dict) -> str:
    bars = _bars(results)
    if bars["t2i"] == bars["edit"]:
        return f"≥ {100 * bars['t2i']:g} % of both"
    return f"≥ {100 * bars['t2i']:g} % / {100 * bars['edit']:g} %"


def _plain_cells(results: dict) -> list[list[str]]:
    """Returns header and rows of the main table as text, the raw name first."""
    columns = _main_columns(results)
    lines = [["name", *(column.title for column in columns), _bar_title(results)]]
    for row in results.get("rows", ()):
        line = [str(row.get("name", DASH))]
        for column in columns:
            value, error = column.value(row), column.error(row)
            with_error = value is not None and error is not None
            line.append(column.form(value) + (f" ± {column.form(error)}" if with_error else ""))
        lines.append([*line, "yes" if reaches_bars(results, row) else "no"])
    return lines


ERROR_TITLES = ("Capability", "Source", "Error before", "Error after", "Relative error", "Error closed")


def _error_cells(results: dict) -> list[list[str]]:
    """Returns a header, and a line for each capability: how far the student was and is from its source; or nothing."""
    lines = []
    for name, measured in (results.get("velocity_errors") or {}).items():
        error = _number(measured, "standard_error")
        after = _short(_number(measured, "after")) + (f" ± {_short(error)}" if error is not None else "")
        relative, closed = _number(measured, "relative"), _number(measured, "closed")
        share = DASH if relative is None else f"{100 * relative:.2g} %"
        lines.append(
            [name, str(measured["source"]), _short(_number(measured, "before")), after, share, percent(closed)]
        )
    return [list(ERROR_TITLES), *lines] if lines else []


def _short(value: float | None) -> str:
    return DASH if value is None else f"{value:.3g}"


def format_table(results: dict) -> str:
    """Writes the main table for a terminal: aligned columns, a rule under the header, no line break at the end."""
    lines = _plain_cells(results) if results.get("rows") else _error_cells(results)
    if not lines:
        return "nothing was measured"
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    ]
    return "\n".join([aligned[0], "  ".join("-" * width for width in widths), *aligned[1:]])


def format_markdown(results: dict) -> str:
    """Writes the main table in markdown, the best score of each column in bold; no line break at the end.

    A model's run has the velocity errors from each source in its place.
    """
    if not results.get("rows"):
        head, *lines = _error_cells(results) or [["nothing was measured"]]
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])
    header, *_ = _plain_cells(results)
    lines = [["Model", *header[1:]], ["---", *["---:"] * (len(header) - 1)]]
    columns = _main_columns(results)
    best = [
        _best(column.form(column.value(row)) for row in results.get("rows", ())) if column.ranked else None
        for column in columns
    ]
    for row in results.get("rows", ()):
        line = [label(row.get("name", DASH)).replace("|", "\\|")]
        for column, top in zip(columns, best, strict=True):
            value, error = column.form(column.value(row)), column.error(row)
            text = f"**{value}**" if value == top else value
            line.append(text if error is None or value == DASH else f"{text} ± {column.form(error)}")
        lines.append([*line, "yes" if reaches_bars(results, row) else "no"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
