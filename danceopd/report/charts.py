"""Draws the charts of a report."""

import io
import itertools
import math
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter
from PIL import Image

from danceopd.report.names import EDIT_SOURCE, T2I_SOURCE, _number, label
from danceopd.report.tables import _GEDIT, _GENEVAL, _bars, _row
from danceopd.support.pages import data_uri
from danceopd.support.run_log import Log

_BLUE, _ORANGE, _INK, _GREY = "#24598f", "#c1571b", "#1b1b1b", "#8a8a8a"

_PALETTE = (_BLUE, _ORANGE, "#3c7d4e", "#7d4c96", "#a3403f", "#4b8c94", "#8a6d1f")

Curve = tuple[np.ndarray, np.ndarray]  # x and y

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
    """Draws panels side by side as one inline SVG, each drawn by a function of its axes.

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
    return Markup(svg)  # Safe: matplotlib escapes the texts in what it draws.


def _curve(records: list[dict], *path: str, x: str = "step") -> Curve:
    """Returns the figure at path over the records' x (or step, where the record has no x): two [n] float64 arrays."""
    points = []
    for record in records:
        at, value = _number(record, x), _number(record, *path)
        if value is not None:
            points.append((record["step"] if at is None else at, value))
    return np.array([p[0] for p in points], float), np.array([p[1] for p in points], float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Returns the centred moving mean of [n] float64, its window a triangle over about a fifteenth of the curve."""
    half = np.arange(1, len(values) // 30 + 2, dtype=float)
    window = np.concatenate([half, half[-2::-1]])
    weight = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / weight


def _dot(x: np.ndarray) -> dict:
    """Returns the style by which a lone point is seen, since a line of one has no length."""
    return {"marker": "o", "markersize": 5} if len(x) == 1 else {}


PIECES = 1000  # of a curve: more than a chart has pixels across


def outline(x: np.ndarray, y: np.ndarray) -> Curve:
    """Returns a curve as a chart shows it: of a longer one the least and the greatest value of each of PIECES."""
    if len(x) <= 2 * PIECES:
        return x, y
    ends = np.linspace(0, len(x), PIECES + 1).astype(int)
    pieces = [(a, y[a:b]) for a, b in itertools.pairwise(ends)]
    kept = np.unique([a + i for a, piece in pieces for i in (piece.argmin(), piece.argmax())])
    return x[kept], y[kept]


def trend(x: np.ndarray, y: np.ndarray) -> Curve:
    """Returns a curve smoothed, a longer one as the means of PIECES pieces."""
    if len(x) > 2 * PIECES:
        ends = np.linspace(0, len(x), PIECES + 1).astype(int)
        x, y = (np.add.reduceat(values, ends[:-1]) / np.diff(ends) for values in (x, y))
    return x, smooth(y)


def _draw_losses(ax, title: str, curves: dict[str, Curve], colors: Sequence[str]):
    for (name, (x, y)), color in zip(curves.items(), itertools.cycle(colors), strict=False):
        ax.plot(*outline(x, y), color=color, alpha=0.22, linewidth=0.8)
        ax.plot(*trend(x, y), color=color, label=name, **_dot(x))
    everything = np.concatenate([y for _, y in curves.values()])
    if everything.min() > 0 and everything.max() / everything.min() > 8:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_title(title)
    ax.set_xlabel("update")
    if len(curves) > 1:
        ax.legend()


def _loss_chart(log: Log) -> Markup | None:
    """Draws the loss over updates, overall and for each capability; None without a loss."""
    overall = _curve(log.training, "loss")
    if not len(overall[0]):
        return None
    panels = [lambda ax: _draw_losses(ax, "Loss", {"loss": overall}, [_INK])]
    names = sorted({name for r in log.training for name in r.get("loss_by_capability", {})})
    names = [name for name in ("t2i", "edit") if name in names] + [n for n in names if n not in ("t2i", "edit")]
    parts = {label(name): _curve(log.training, "loss_by_capability", name) for name in names}
    parts = {name: curve for name, curve in parts.items() if len(curve[0])}
    if parts:
        panels.append(lambda ax: _draw_losses(ax, "Loss by capability", parts, _PALETTE))
    return _chart("loss", panels)


def _draw_curve(ax, title: str, x: np.ndarray, y: np.ndarray):
    ax.plot(*outline(x, y), color=_INK, alpha=0.22, linewidth=0.8)
    ax.plot(*trend(x, y), color=_INK, **_dot(x))
    ax.set_ylim(0, None)
    ax.set_title(title)
    ax.set_xlabel("update")


def _effort_chart(log: Log) -> Markup | None:
    """Draws the gradient norm and samples per second over updates; None without either."""
    curves = [
        (title, *_curve(log.training, key))
        for key, title in (("gradient_norm", "Gradient norm"), ("samples_per_second", "Samples per second"))
    ]
    panels = [lambda ax, curve=curve: _draw_curve(ax, *curve) for curve in curves if len(curve[1])]
    return _chart("effort", panels) if panels else None


def _draw_error(ax, name: str, by_sigma: dict):
    for who, color in (("before", _GREY), ("after", _BLUE)):
        ax.plot(by_sigma["sigma"], by_sigma[who], color=color, marker="o", markersize=3, label=who)
    ax.set_ylim(0, None)
    ax.invert_xaxis()  # as a picture is drawn, from noise on the left
    ax.set_title(label(name))
    ax.set_xlabel("noise level σ")
    ax.legend()


def _error_charts(results: dict) -> list[Markup]:
    """Draws the velocity error over noise levels, a panel for each capability, three in a row."""
    panels = [
        lambda ax, name=name, error=error: _draw_error(ax, name, error["by_sigma"])
        for name, error in (results.get("velocity_errors") or {}).items()
    ]
    return [_chart(f"error{i}", panels[i : i + 3]) for i in range(0, len(panels), 3)]


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
    """Draws both scores over network evaluations, with the source's level and its bar; None without a score."""
    counted = all(_number(record, "network_evaluations") is not None for record in log.evaluations)
    x, x_label = ("network_evaluations", "network evaluations") if counted else ("step", "update")
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


def _draw_health(ax, key: str, curves: dict[str, Curve]):
    """Draws ratios by noise level around 1, or the gradient norm's quantiles."""
    ratio = key.endswith("_ratio")
    colors = matplotlib.colormaps["viridis"](np.linspace(0.08, 0.88, len(curves)))
    for (name, (x, y)), color in zip(curves.items(), colors, strict=True):
        ax.plot(*outline(x, y), color=color, label=f"σ = {name}" if ratio else name, linewidth=1.4, **_dot(x))
    if ratio:
        ax.axhline(1, color=_GREY, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.9), max(high, 1.1))
    ax.set_title(label(key))
    ax.set_xlabel("update")
    ax.legend(fontsize=8.5, ncols=1 if len(curves) < 5 else 2)


def _sigma(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def _health_chart(log: Log) -> Markup | None:
    """Draws the recorded ratios over updates, a line for each sigma; None without health records."""
    panels = []
    values = [record["health"] for record in log.health]
    for key in dict.fromkeys(key for health in values for key in health if key != "queries"):
        at = {sigma for health in values if isinstance(health.get(key), dict) for sigma in health[key]}
        curves = {sigma: _curve(log.health, "health", key, sigma) for sigma in sorted(at, key=_sigma)}
        curves = {sigma: curve for sigma, curve in curves.items() if len(curve[0])}
        if curves:
            panels.append(lambda ax, key=key, curves=curves: _draw_health(ax, key, curves))
    return _chart("health", panels) if panels else None


def tensor_uri(picture: torch.Tensor) -> str:
    """Returns a [3, H, W] uint8 picture as a PNG data URI. Raises ValueError for another shape or type."""
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"expected a [3, H, W] uint8 picture, got {list(picture.shape)} {picture.dtype}")
    image = Image.fromarray(picture.cpu().permute(1, 2, 0).contiguous().numpy())
    return data_uri(image, optimize=True)
