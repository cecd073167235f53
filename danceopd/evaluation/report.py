"""The report of a training run: one self-contained HTML page, and its main table as text and as markdown."""

import base64
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter
from PIL import Image

from danceopd.checkpoint import write_atomic

DASH = "–"
T2I_SOURCE, EDIT_SOURCE = "source_t2i", "source_edit"
LABELS = {
    "base": "Base",
    "source_t2i": "T2I source",
    "source_edit": "Edit source",
    "source_local": "Local-edit source",
    "source_global": "Global-edit source",
    "weight_merge": "Weight merge",
    "joint": "Joint training",
    "off_policy": "Off-policy distillation",
    "diffusion_opd": "DiffusionOPD",
    "flow_opd": "Flow-OPD",
    "flow_opd_attached": "Flow-OPD, advantage not detached",
    "off_policy_samples": "Off-policy, sources' samples",
    "danceopd_fast": "DanceOPD fast",
    "source_style": "Style source",
    "danceopd": "DanceOPD",
    "t2i": "T2I",
    "memory_gib": "Memory (GiB)",
    "cpu": "CPU",
    "gpu": "GPU",
    "torch": "PyTorch",
}
TASKS = {
    "single_object": "Single object",
    "two_object": "Two objects",
    "counting": "Counting",
    "colors": "Colors",
    "position": "Position",
    "color_attr": "Color attribution",
}
KINDS = {
    "subject-add": "Add",
    "subject-remove": "Remove",
    "subject-replace": "Replace",
    "color-alter": "Color",
    "background-change": "Background",
    "style-change": "Style",
}
_BLUE, _ORANGE, _INK, _GREY = "#24598f", "#c1571b", "#1b1b1b", "#8a8a8a"
_PALETTE = (_BLUE, _ORANGE, "#3c7d4e", "#7d4c96", "#a3403f", "#4b8c94", "#8a6d1f")


def label(name: str) -> str:
    """The printed form of a row's, capability's or machine entry's name."""
    words = str(name).replace("_", " ")
    return LABELS.get(name, words[:1].upper() + words[1:])


# ---------------------------------------------------------------------------------------------- results


def _number(tree: object, *path: str) -> float | None:
    """The finite number at the path of keys, or None where it, or a key on the way, is absent."""
    for key in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    if isinstance(tree, bool) or not isinstance(tree, int | float) or not math.isfinite(tree):
        return None
    return float(tree)


def _row(results: dict, name: str) -> dict | None:
    return next((row for row in results.get("rows", ()) if row.get("name") == name), None)


def _share(results: dict, row: dict | None, source: str, path: Sequence[str]) -> float | None:
    """The row's figure over the source row's; None where either is absent or the source's is not above 0."""
    value, level = _number(row, *path), _number(_row(results, source), *path)
    return value / level if value is not None and level is not None and level > 0 else None


def shares(results: dict, row: dict | None) -> dict[str, float | None]:
    """{"t2i": the row's share of the T2I source's overall, "edit": of the Edit source's average}."""
    return {
        "t2i": _share(results, row, T2I_SOURCE, ("geneval", "overall")),
        "edit": _share(results, row, EDIT_SOURCE, ("gedit", "average")),
    }


def _bars(results: dict) -> dict[str, float]:
    return {"t2i": 0.95, "edit": 0.95} | results.get("bars", {})


def reaches_bars(results: dict, row: dict | None) -> bool:
    """Does the row reach results["bars"] (0.95 unless given) of both sources?"""
    bars = _bars(results)
    return all(share is not None and share >= bars[key] for key, share in shares(results, row).items())


def percent(share: float | None) -> str:
    """ "96.3 %", cut rather than rounded, so that a share just under a bar is never printed as the bar."""
    return DASH if share is None else f"{math.floor(share * 1000 + 1e-9) / 10:.1f} %"


# ----------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Column:
    """One column of figures: value, and error where it has one, of a row of results, printed with form."""

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
    """The greatest printed figure: rows that print alike tie. None where fewer than two rows have one."""
    figures = [text for text in texts if text != DASH]
    return max(figures, key=float) if len(figures) > 1 else None


def _table(results: dict, columns: list[Column]) -> dict | None:
    """What the page's table macro prints; columns without a figure are left out, None where all are."""
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
    """Header and rows of the main table as text, the raw name first."""
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


GAP_TITLES = ("Capability", "Source", "Error before", "Error after", "Relative error", "Gap closed")


def _gap_cells(results: dict) -> list[list[str]]:
    """Header and a line for each capability: how far the student was and is from its source. Empty without any."""
    lines = []
    for name, gap in (results.get("gaps") or {}).items():
        error = _number(gap, "standard_error")
        after = _short(_number(gap, "after")) + (f" ± {_short(error)}" if error is not None else "")
        relative, closed = _number(gap, "relative"), _number(gap, "closed")
        share = DASH if relative is None else f"{100 * relative:.2g} %"
        lines.append([name, str(gap["source"]), _short(_number(gap, "before")), after, share, percent(closed)])
    return [list(GAP_TITLES), *lines] if lines else []


def _short(value: float | None) -> str:
    return DASH if value is None else f"{value:.3g}"


def format_table(results: dict) -> str:
    """The main table for a terminal: aligned columns, a rule under the header, no line break at the end."""
    lines = _plain_cells(results) if results.get("rows") else _gap_cells(results)
    if not lines:
        return "nothing was measured"
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    ]
    return "\n".join([aligned[0], "  ".join("-" * width for width in widths), *aligned[1:]])


def format_markdown(results: dict) -> str:
    """The main table in markdown, the best score of each column in bold; no line break at the end.

    Of a model's run, the velocity errors from each source.
    """
    if not results.get("rows"):
        head, *lines = _gap_cells(results) or [["nothing was measured"]]
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


# ---------------------------------------------------------------------------------------------- summary


def summary(results: dict) -> str:
    """One paragraph of plain text: what the student reaches of each source, at what cost."""
    if "gaps" in results:
        return _gap_summary(results)
    student = _row(results, results.get("student", "danceopd"))
    if student is None:
        return "The results hold no row of the student."
    own, name = shares(results, student), label(student["name"])
    parts = []
    for key, path, form, score, source in (
        ("t2i", ("geneval", "overall"), _GENEVAL, "a GenEval overall of", T2I_SOURCE),
        ("edit", ("gedit", "average"), _GEDIT, "a GEdit average of", EDIT_SOURCE),
    ):
        value = _number(student, *path)
        if value is None:
            continue
        part = f"{score} {form(value)}"
        if own[key] is not None:
            level = form(_number(_row(results, source), *path))
            part += f" ({percent(own[key])} of the {label(source)}’s {level})"
        parts.append(part)
    if not parts:
        return f"{name} has not been scored."
    sentence = f"{name} reaches {' and '.join(parts)}{_cost(results)}."
    return " ".join([sentence, *_verdict(results, student)])


def _gap_summary(results: dict) -> str:
    """Of a model's run: how much of the distance to each source is gone, at what cost."""
    name, gaps = label(results.get("student", "danceopd")), results["gaps"]
    if not gaps:
        return f"{name} was trained{_cost(results)}; its distance from the sources was not measured."
    closed = [f"{percent(g['closed'])} for {name}" for name, g in gaps.items() if _number(g, "closed") is not None]
    kept = [
        f"For {name} it began as its source, and its error is now {100 * gap['relative']:.2g} % of the mean square of "
        "the source’s velocity."
        for name, gap in gaps.items()
        if _number(gap, "closed") is None
    ]
    of = "Of the distance between the untrained student’s velocity and its source’s, measured as squared error"
    parts = [f"{of}, {name} has closed {_and(closed)}{_cost(results)}."] if closed else []
    return " ".join([*parts, *kept])


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _cost(results: dict) -> str:
    """ " after 412 s of training and 5,120,000 network evaluations", as far as the results say."""
    seconds, evaluations = _number(results, "seconds"), _number(results, "network_evaluations")
    cost = []
    if seconds is not None:
        cost.append(f"{duration(seconds)} of training")
    if evaluations is not None:
        cost.append(f"{evaluations:,.0f} network evaluations")
    return f", after {' and '.join(cost)}" if cost else ""


def duration(seconds: float) -> str:
    """ "48 s", "1,234 s (20.6 min)", "7,380 s (2.1 h)"."""
    text = f"{seconds:,.0f} s"
    if seconds >= 7200:
        return f"{text} ({seconds / 3600:.1f} h)"
    return f"{text} ({seconds / 60:.1f} min)" if seconds >= 120 else text


def _verdict(results: dict, student: dict) -> list[str]:
    """A sentence on the bars where both shares are known, and one on who else reaches them."""
    own, bars = shares(results, student), _bars(results)
    if None in own.values():
        return []
    missed = [key for key in own if own[key] < bars[key]]
    if missed:
        what = {"t2i": "text to image", "edit": "editing"}
        which = " and ".join(f"{100 * bars[key]:g} % of the source’s {what[key]}" for key in missed)
        return [f"It misses the bar of {which}."]
    others = [label(row["name"]) for row in results["rows"] if row is not student and reaches_bars(results, row)]
    if others:
        return [f"It reaches the bar of both sources, as do: {', '.join(others)}."]
    if len(results["rows"]) == 1:
        return ["It reaches the bar of both sources."]
    return ["It is the only model here that reaches the bar of both sources."]


# -------------------------------------------------------------------------------------------------- log


@dataclass(frozen=True)
class Log:
    """The records of a training log by what they hold, each list in the order of steps."""

    training: list[dict]
    evaluations: list[dict]
    health: list[dict]
    warnings: list[dict]
    unreadable: int = 0  # lines lost, other than the last


def read_log(path: Path) -> Log:
    """Read log.jsonl; an absent file is an empty log.

    A last line cut off by a killed process is left out. A run that was resumed writes some steps again:
    what came before of the same kind from that step on is dropped.
    """
    kinds: dict[str, list[dict]] = {"loss": [], "evaluation": [], "health": [], "warning": []}
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
    unreadable = 0
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or _number(record, "step") is None:
            unreadable += i < len(lines) - 1
            continue
        for kind in kinds.keys() & record.keys():
            if kind != "warning":
                while kinds[kind] and kinds[kind][-1]["step"] >= record["step"]:
                    kinds[kind].pop()
            kinds[kind].append(record)
    return Log(kinds["loss"], kinds["evaluation"], kinds["health"], kinds["warning"], unreadable)


def _warnings(results: dict, log: Log) -> list[str]:
    """The results' warnings, then the log's, one line for each text with the steps that it was given at."""
    given = [str(text) for text in results.get("warnings", ())]
    steps: dict[str, list[int]] = {}
    for record in log.warnings:
        steps.setdefault(str(record["warning"]), []).append(record["step"])
    for text, at in steps.items():
        if any(text in line for line in given):
            continue
        where = f"Step {at[0]}" if len(at) == 1 else f"Steps {min(at)} to {max(at)}, {len(at)} times"
        given.append(f"{where}: {text}")
    if log.unreadable:
        lines = "one line" if log.unreadable == 1 else f"{log.unreadable} lines"
        given.append(f"The training log holds {lines} that cannot be read; the curves leave them out.")
    return given


# ----------------------------------------------------------------------------------------------- charts

CHART_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "danceopd",
    "text.parse_math": False,
    "font.family": "serif",
    "font.serif": ["DejaVu Serif"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.linewidth": 0.7,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9e9e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


def _chart(name: str, panels: list[Callable]) -> Markup:
    """Panels side by side as one inline SVG, each drawn by a function of its axes.

    Every id starts with name, so that the page's charts cannot point into one another.
    """
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(10.4, 3.35), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, wspace=0.04)
        axes = figure.subplots(1, max(len(panels), 2), squeeze=False)[0]
        for draw, ax in zip(panels, axes, strict=False):
            draw(ax)
        for ax in axes[len(panels) :]:
            ax.remove()
        buffer = io.StringIO()
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for before in (' id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{name}-")
    return Markup(svg)


def _curve(records: list[dict], *path: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """The figure at path over the records' x (or step, where the record has no x): two [n] float64 arrays."""
    points = []
    for record in records:
        at, value = _number(record, x), _number(record, *path)
        if value is not None:
            points.append((record["step"] if at is None else at, value))
    return np.array([p[0] for p in points], float), np.array([p[1] for p in points], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean with a triangular window of about a fifteenth of the curve: [n] to [n] float64."""
    half = np.arange(1, len(values) // 30 + 2, dtype=float)
    window = np.concatenate([half, half[-2::-1]])
    weight = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / weight


def _draw_losses(ax, title: str, curves: dict[str, tuple[np.ndarray, np.ndarray]], colors: Sequence[str]):
    for (name, (x, y)), color in zip(curves.items(), itertools.cycle(colors), strict=False):
        ax.plot(x, y, color=color, alpha=0.22, linewidth=0.8)
        ax.plot(x, smooth(y), color=color, label=name)
    everything = np.concatenate([y for _, y in curves.values()])
    if everything.min() > 0 and everything.max() / everything.min() > 8:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_title(title)
    ax.set_xlabel("optimizer step")
    if len(curves) > 1:
        ax.legend()


def _loss_chart(log: Log) -> Markup | None:
    """The loss over steps, overall and for each capability; None without a loss."""
    overall = _curve(log.training, "loss")
    if not len(overall[0]):
        return None
    panels = [lambda ax: _draw_losses(ax, "Loss", {"loss": overall}, [_INK])]
    names = sorted({name for r in log.training for name in (r.get("loss_by_capability") or {})})
    names = [name for name in ("t2i", "edit") if name in names] + [n for n in names if n not in ("t2i", "edit")]
    parts = {label(name): _curve(log.training, "loss_by_capability", name) for name in names}
    parts = {name: curve for name, curve in parts.items() if len(curve[0])}
    if parts:
        panels.append(lambda ax: _draw_losses(ax, "Loss by capability", parts, _PALETTE))
    return _chart("loss", panels)


def _draw_curve(ax, title: str, x: np.ndarray, y: np.ndarray):
    ax.plot(x, y, color=_INK, alpha=0.22, linewidth=0.8)
    ax.plot(x, smooth(y), color=_INK)
    ax.set_ylim(0, None)
    ax.set_title(title)
    ax.set_xlabel("optimizer step")


def _effort_chart(log: Log) -> Markup | None:
    """Gradient norm and samples per second over steps; None without either."""
    curves = [
        (title, *_curve(log.training, key))
        for key, title in (("gradient_norm", "Gradient norm"), ("samples_per_second", "Samples per second"))
    ]
    panels = [lambda ax, curve=curve: _draw_curve(ax, *curve) for curve in curves if len(curve[1])]
    return _chart("effort", panels) if panels else None


def _draw_gap(ax, name: str, by_sigma: dict):
    for who, color in (("before", _GREY), ("after", _BLUE)):
        ax.plot(by_sigma["sigma"], by_sigma[who], color=color, marker="o", markersize=3, label=who)
    ax.set_ylim(0, None)
    ax.invert_xaxis()  # as a picture is drawn, from noise on the left
    ax.set_title(label(name))
    ax.set_xlabel("noise level σ")
    ax.legend()


def _gap_charts(results: dict) -> list[Markup]:
    """The velocity error over noise levels, a panel for each capability, three in a row."""
    panels = [
        lambda ax, name=name, gap=gap: _draw_gap(ax, name, gap["by_sigma"])
        for name, gap in (results.get("gaps") or {}).items()
    ]
    return [_chart(f"gap{i}", panels[i : i + 3]) for i in range(0, len(panels), 3)]


def _draw_score(ax, title: str, x: np.ndarray, y: np.ndarray, color: str, source: str, level, bar, x_label):
    ax.plot(x, y, color=color, marker="o", markersize=4, markeredgecolor="white", markeredgewidth=0.7)
    if level is not None:
        style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8.5}
        ax.axhline(level, color=_INK, linewidth=1, linestyle=(0, (5, 3)))
        ax.annotate(f"{source}", (1, level), (0, 4), ha="right", color=_INK, **style)
        ax.axhline(bar * level, color=_GREY, linewidth=0.9, linestyle=(0, (1, 2.5)))
        below = {"ha": "right", "va": "top", "color": "#6b6b6b"}
        ax.annotate(f"{100 * bar:g} %", (1, bar * level), (0, -3), **below, **style)
        low, high = min(y.min(), bar * level), max(y.max(), level)
        room = (high - low) or 1
        ax.set_ylim(low - 0.12 * room, high + 0.15 * room)
    ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    ax.set_title(title)
    ax.set_xlabel(x_label)


def _score_chart(log: Log, results: dict) -> Markup | None:
    """Both scores over network evaluations, with the source's level and its bar; None without a score."""
    counted = all(_number(record, "network_evaluations") is not None for record in log.evaluations)
    x, x_label = ("network_evaluations", "network evaluations") if counted else ("step", "optimizer step")
    panels = []
    for key, path, title, color, source, level, form in (
        ("t2i", "geneval_overall", "GenEval overall", _BLUE, T2I_SOURCE, ("geneval", "overall"), _GENEVAL),
        ("edit", "gedit_average", "GEdit average", _ORANGE, EDIT_SOURCE, ("gedit", "average"), _GEDIT),
    ):
        curve = _curve(log.evaluations, "evaluation", path, x=x)
        if len(curve[0]):
            height = _number(_row(results, source), *level)
            rest = (
                title,
                *curve,
                color,
                f"{label(source)} {form(height)}",
                height,
                _bars(results)[key],
                x_label,
            )
            panels.append(lambda ax, rest=rest: _draw_score(ax, *rest))
    return _chart("score", panels) if panels else None


def _draw_health(ax, key: str, curves: dict[str, tuple[np.ndarray, np.ndarray]]):
    """Ratios by noise level around 1, or the gradient norm's quantiles."""
    ratio = key.endswith("_ratio")
    colors = matplotlib.colormaps["viridis"](np.linspace(0.08, 0.88, len(curves)))
    for (name, (x, y)), color in zip(curves.items(), colors, strict=True):
        ax.plot(x, y, color=color, label=f"σ = {name}" if ratio else name, linewidth=1.4)
    if ratio:
        ax.axhline(1, color=_GREY, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.9), max(high, 1.1))
    ax.set_title(label(key))
    ax.set_xlabel("optimizer step")
    ax.legend(fontsize=8.5, ncols=1 if len(curves) < 5 else 2)


def _sigma(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _health_chart(log: Log) -> Markup | None:
    """The recorded ratios over steps, a line for each sigma; None without health records."""
    panels = []
    values = [record["health"] for record in log.health if isinstance(record["health"], dict)]
    for key in dict.fromkeys(key for health in values for key in health):
        at = {sigma for health in values if isinstance(health.get(key), dict) for sigma in health[key]}
        curves = {sigma: _curve(log.health, "health", key, sigma) for sigma in sorted(at, key=_sigma)}
        curves = {sigma: curve for sigma, curve in curves.items() if len(curve[0])}
        if curves:
            panels.append(lambda ax, key=key, curves=curves: _draw_health(ax, key, curves))
    return _chart("health", panels) if panels else None


# --------------------------------------------------------------------------------------------- pictures


def data_uri(picture: torch.Tensor) -> str:
    """A [3, H, W] uint8 picture as a PNG data URI. Raises ValueError for another shape or type."""
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"expected a [3, H, W] uint8 picture, got {list(picture.shape)} {picture.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _uris(what: str, pictures: torch.Tensor, n: int) -> list[str]:
    """n pictures [n, 3, H, W] uint8 as data URIs. Raises ValueError where there are not n."""
    if len(pictures) != n:
        raise ValueError(f"{what}: expected {n} pictures, got {len(pictures)}")
    return [data_uri(picture) for picture in pictures]


def _marks(what: str, marks: Sequence | None, n: int) -> list:
    """n marks as a list, n times None where there are none. Raises ValueError for another number."""
    marks = [None] * n if marks is None else [m.item() if hasattr(m, "item") else m for m in marks]
    if len(marks) != n:
        raise ValueError(f"{what}: expected {n} marks, got {len(marks)}")
    return marks


def _grid(section: dict, texts: str, marks: str) -> dict | None:
    """Rows of a picture grid: section[texts] [N] down, the models of section["rows"] across.

    Raises ValueError where a model's pictures or section[marks] are not N.
    """
    lines, models = list(section.get(texts, ())), section.get("rows", {})
    n = len(lines)
    if not n or not models:
        return None
    uris = {name: _uris(name, pictures, n) for name, pictures in models.items()}
    marked = {name: _marks(name, section.get(marks, {}).get(name), n) for name in models}
    sources = _uris("sources", section["sources"], n) if section.get("sources") is not None else [None] * n
    rows = []
    for i in range(n):
        best = max((m[i] for m in marked.values() if m[i] is not None), default=None)
        cells = [
            {
                "uri": uris[name][i],
                "mark": marked[name][i],
                "best": marked[name][i] == best,
                "model": label(name),
            }
            for name in models
        ]
        rows.append({"text": lines[i], "source": sources[i], "cells": cells})
    return {"models": [label(name) for name in models], "rows": rows, "has_source": sources[0] is not None}


def _filmstrip(strips: list[dict]) -> list[dict]:
    """Frames of each rollout. Raises ValueError where states and sigmas differ in number."""
    return [
        {
            "prompt": strip["prompt"],
            "source": None if strip.get("source") is None else data_uri(strip["source"]),
            "frames": [
                {"uri": uri, "sigma": f"{float(sigma):.2f}", "queried": i == strip.get("queried")}
                for i, (uri, sigma) in enumerate(
                    zip(
                        _uris("filmstrip", strip["states"], len(strip["sigmas"])),
                        strip["sigmas"],
                        strict=True,
                    )
                )
            ],
        }
        for strip in strips
    ]


# ------------------------------------------------------------------------------------------------- page


def _yaml(config: dict) -> str:
    plain = json.loads(json.dumps(config, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip()


def _run_facts(results: dict, log: Log) -> list[tuple[str, str]]:
    """Name and value of what the run cost and where it ran, the machine's own entries last."""
    facts = []
    if results.get("seed") is not None:
        facts.append(("Seed", str(results["seed"])))
    if log.training:
        facts.append(("Optimizer steps", f"{log.training[-1]['step']:,}"))
    if (seconds := _number(results, "seconds")) is not None:
        facts.append(("Training time", duration(seconds)))
    if (evaluations := _number(results, "network_evaluations")) is not None:
        facts.append(("Network evaluations", f"{evaluations:,.0f}"))
    _, speed = _curve(log.training, "samples_per_second")
    if len(speed):
        facts.append(("Samples per second, median", f"{np.median(speed):.3g}"))
    for key, value in results.get("machine", {}).items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        facts.append((label(key), text))
    return facts


def render_report(run_name: str, results: dict, log: Log, pictures: dict) -> str:
    """The page's HTML. Raises ValueError for pictures that do not match their prompts or are not uint8."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    bars = _bars(results)
    return environment.get_template("report.html.j2").render(
        run_name=run_name,
        summary=re.sub(r"(\d) (?=%|(?:s|min|h)\b)", "\\1\N{NO-BREAK SPACE}", summary(results)),
        student=label(results.get("student", "danceopd")),
        warnings=_warnings(results, log),
        main=_table(results, _main_columns(results)),
        bar_title=_bar_title(results),
        bar_text=" and ".join(dict.fromkeys(f"{100 * bar:g} %" for bar in bars.values())),
        tasks=_table(results, _task_columns()),
        kinds=_table(results, _kind_columns()),
        held_out=_table(results, _held_out_columns()),
        losses=_loss_chart(log),
        scores=_score_chart(log, results),
        effort=_effort_chart(log),
        health=_health_chart(log),
        gaps=_gap_cells(results),
        gap_charts=_gap_charts(results),
        gap_samples=max((gap["samples"] for gap in (results.get("gaps") or {}).values()), default=0),
        samples=pictures.get("samples"),
        t2i=_grid(pictures.get("t2i") or {}, "prompts", "correct"),
        edit=_grid(pictures.get("edit") or {}, "instructions", "scores"),
        filmstrip=_filmstrip(pictures.get("filmstrip") or []),
        config=_yaml(results["config"]) if results.get("config") else None,
        facts=_run_facts(results, log),
        next_table=itertools.count(1).__next__,
        next_figure=itertools.count(1).__next__,
    )


def write_report(run_dir: Path, results: dict, pictures: dict) -> Path:
    """Write run_dir/report.html atomically and return its path.

    results holds the scored rows, the run's cost, machine, configuration and warnings; run_dir/log.jsonl,
    where there is one, the curves. pictures holds uint8 tensors: "t2i" and "edit" grids of [N, 3, H, W] for
    each model, and "filmstrip", a list of rollouts with states [S, 3, H, W]; of a model's run "samples", its newest
    grid as {"step", "uri", "width"}. What is absent is left out of
    the page. Raises ValueError for pictures that do not match their prompts or are not uint8.
    """
    run_dir = Path(run_dir)
    html = render_report(run_dir.resolve().name, results, read_log(run_dir / "log.jsonl"), pictures)
    path = run_dir / "report.html"
    write_atomic(path, html.encode("utf-8"))
    return path
