"""Writes results/REPORT.md: the paper's tables beside ours, its claims, and every ablation as a plot.

What has not been run yet is left out or said to be missing.
"""

import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from danceopd.report.charts import CHART_STYLE
from danceopd.report.names import DASH, duration
from danceopd.report.names import label as plain_label
from danceopd.reproduce.claims import BAND, COMPARED, KEPT, NEAR, Claim, by_scales, claims, own_guidance
from danceopd.reproduce.matrix import ABSORBED_SCALES, MINIATURE, MINIATURE_RATES, OPERATORS
from danceopd.reproduce.paper import TABLES
from danceopd.reproduce.results import (
    GEDIT,
    GENEVAL,
    MISSING,
    NAMES,
    NOT,
    REPRODUCED,
    UNDECIDED,
    chosen_rate,
    figure,
    label,
    mean_error,
    rates,
    read,
    tables_of,
)
from danceopd.support.files import write_atomic

GREY = "#8a8a8a"

COLORS = {
    "danceopd": "#24598f",
    "danceopd_fast": "#c1571b",
    "joint": "#8a6d1f",
    "off_policy": "#3c7d4e",
    "off_policy_samples": "#93bd6c",
    "diffusion_opd": "#7d4c96",
    "flow_opd": "#a3403f",
    "flow_opd_attached": "#e09a8d",
}

AXES = {
    "routing": "Routing",
    "query": "Which state is asked",
    "queries": "Queries of one trajectory",
    "rollout": "Rollout steps",
    "objective": "Objective",
    "data": "Size of the data",
    "start": "What the student begins as",
    "updates": "Methods at equal updates",
    "beyond": "Beyond the paper's recipe",
}


@dataclass
class Page:
    """A page of markdown as it grows: its lines, and its plots by the name of their file."""

    lines: list[str] = field(default_factory=lambda: ["# The paper's claims on the picture world", ""])
    plots: dict[str, Figure] = field(default_factory=dict)

    def heading(self, text: str, level: int = 2) -> None:
        self.text("#" * level + " " + text)

    def text(self, text: str) -> None:
        self.lines += [text, ""]

    def table(self, caption: str, header: list[str], rows: list[list[str]]) -> None:
        if not rows:
            return
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
        self.lines += [caption, ""] if caption else []
        self.lines += ["| " + " | ".join(cells[0]) + " |", "|" + " --- |" * len(header)]
        self.lines += ["| " + " | ".join(row) + " |" for row in cells[1:]] + [""]

    def plot(self, name: str, caption: str, panels: list[Callable], height: float = 3.6) -> None:
        self.plots[name] = _figure(panels, height)
        self.lines += [f"![{caption}](plots/{name}.png)", "", caption, ""]

    def markdown(self) -> str:
        return "\n".join(self.lines)


def build(files: dict[str, dict]) -> Page:
    """Builds the report from the results files by table."""
    tables = tables_of(files)
    page = Page()
    _claims(page, claims(tables))
    for setting, title in (("A", "Setting A: text-to-image and edit"), ("B", "Setting B: local and global edit")):
        if setting in tables:
            _methods(page, setting, title, tables[setting])
    if "miniature" in files:
        _miniature(page, files["miniature"]["rows"])
    if "miniature_ablations" in tables:
        page.heading("One change at a time on the miniature")
        page.text("DanceOPD there at a quarter of the evaluations; the first row, in blue, is the default.")
        _ablation(page, "One change at a time", "miniature_ablations", tables["miniature_ablations"])
    if "merge" in files:
        _merges(page, files["merge"]["rows"])
    if "operators" in tables:
        _absorbed(page, tables["operators"])
    if "unseen" in tables:
        _unseen(page, tables["unseen"])
    if "ablations" in tables:
        _ablations(page, tables["ablations"])
    if "D" in tables:
        _guidance(page, tables["D"])
    if "grid" in tables:
        _grid(page, "Learning rates", "Where the lowest was best, lower ones were added.", tables["grid"])
    if "miniature_grid" in tables:
        _grid(page, "Learning rates on the miniature", _untuned(tables["miniature_grid"]), tables["miniature_grid"])
    if "C" in tables:
        _plain(page, "Setting C: a style absorbed", tables["C"], [GENEVAL, "style_share", "sketch_overall"])
    if "E" in tables:
        metrics = [GENEVAL, "local_average", "global_average", "style_share", "guided_overall"]
        _plain(page, "Setting E: five capabilities at once", tables["E"], metrics)
    if "F" in tables:
        _plain(page, "Setting F: a capability added later", tables["F"], [GENEVAL, GEDIT, "style_share"])
        page.text("before: setting A's students. without_self: the new source alone, so what was there is forgotten.")
    _again(page, files)
    return page


def _claims(page: Page, found: list[Claim]) -> None:
    counts = {v: sum(claim.verdict == v for claim in found) for v in (NOT, REPRODUCED, UNDECIDED, MISSING)}
    page.text(f"Of {len(found)} claims: " + ", ".join(f"{n} {v}" for v, n in counts.items() if n) + ".")
    against = [claim for claim in found if claim.verdict == NOT]
    page.heading("What contradicts the paper")
    if against:
        page.table(
            "Claims decided against the paper.",
            ["claim", "paper", "here"],
            [[c.text, c.paper or DASH, c.figures] for c in against],
        )
    else:
        page.text("Nothing that was decided.")
    page.heading("Every claim")
    page.text(
        "A difference counts as decided at two standard errors over the seeds, taken seed by seed where both rows have "
        "the same seeds: these share the evaluation's prompts and noise. With three seeds, two equal methods differ by "
        "that much in 18 % of comparisons (Student's t, two degrees of freedom), so a lone decided line is weak. A "
        "claim about several rows is reproduced if it holds against each; those decided against it are in bold. Beside "
        "an undecided difference stands how many seeds would decide it, if its mean and its spread stay as they are."
    )
    page.text(
        "Published figures are on GEdit-Bench and GenEval with large models, ours on the picture world: "
        "only orders can be compared, not numbers."
    )
    page.text(
        "Fewer network evaluations: a curve's points are weighed as GenEval overall + edit average / 10, and counted "
        "is where DanceOPD's curve first reaches the best point of the other's, against the evaluations of that point. "
        f"The {KEPT} of the source, the band of {BAND} and the {NEAR} within which C meets the paper are our own."
    )
    lines = [[c.text, c.verdict, c.paper or DASH, c.figures or DASH] for c in found]
    page.table("The paper's claims, its figures and ours.", ["claim", "verdict", "paper", "here"], lines)


def _amount(row: dict, key: str) -> str:
    return f"{row[key]:,.0f}" if row.get(key) else DASH


def _cost(row: dict) -> list[str]:
    """Returns seeds, network evaluations, updates, seconds, commit."""
    amounts = [_amount(row, key) for key in ("network_evaluations", "updates", "seconds")]
    return [str(len(row.get("seeds") or ())) if row.get("seeds") else DASH, *amounts, row.get("commit", DASH)]


COST = ["seeds", "network evaluations", "updates", "seconds", "commit"]


def _bold_best(lines: list[list[str]], columns: range) -> None:
    """Sets the greatest printed figure of each column in bold; rows that print alike tie."""
    for column in columns:
        values = [line[column].split(" ")[0] for line in lines if line[column] != DASH]
        best = max(values, key=float) if len(values) > 1 else None
        for line in lines:
            value, *error = line[column].split(" ", 1)
            line[column] = " ".join([f"**{value}**" if value == best else value, *error])


def _published_cells(paper: dict, name: str) -> list[str]:
    return [DASH if value is None else f"{value:.3f}" for value in paper.get(name, (None, None))]


def _methods(page: Page, setting: str, title: str, rows: dict) -> None:
    page.heading(title)
    paper, header = TABLES[setting], ["row", "paper: edit", "paper: GenEval", "edit average", "GenEval overall"]

    def lines(names: list[str]) -> list[list[str]]:
        result = []
        for name in names:
            row = rows.get(name, {})
            note = f" ({label(row['chosen'])})" if "chosen" in row else ""
            scores = [figure(row, GEDIT), figure(row, GENEVAL)]
            result.append([label(name) + note, *_published_cells(paper, name), *scores, *_cost(row)])
        return result

    compared = [n for n in ("danceopd", *COMPARED) if n in paper or n in rows]
    compared += [n for n, row in rows.items() if row.get("kind") == "trained" and n not in compared]
    sources = [n for n, row in rows.items() if row.get("kind") == "source"]
    merges = [n for n in rows if n not in (*compared, *sources)]
    students = lines(compared)
    _bold_best(students, range(1, 5))
    page.table(
        "The compared methods, ± the standard error over seeds (weight merge: over pictures).", header + COST, students
    )
    page.table("Base and sources, ± over pictures.", [*header, "commit"], [[*s[:5], s[-1]] for s in lines(sources)])
    page.table(
        "Every merge, tuned on validation prompts, ± over pictures; the best there is the weight merge above.",
        ["row", *header[3:], "commit"],
        [[s[0], *s[3:5], s[-1]] for s in lines(merges)],
    )
    curved = {name: rows[name] for name in compared if rows.get(name, {}).get("curve")}
    for x, axis in (("network_evaluations", "network evaluations"), ("seconds", "seconds of training")):
        drawn = {name: row for name, row in curved.items() if row.get(x) and row.get("network_evaluations")}
        if drawn:
            _score_plot(page, setting, setting, drawn, x, axis)


CONDITIONS = {
    "data": "The capabilities' own pictures are at hand",
    "prompts": "Prompts and pictures to edit alone are at hand",
}


def _miniature(page: Page, rows: list[dict]) -> None:
    page.heading("Setting A on the miniature")
    page.text(
        "A FLUX.2 klein pipeline in small, really trained: a LoRA student of rank 64 from two LoRA sources, which "
        "starts as their mean; what is scored is the exported LoRA. Each training has the same number of network "
        "evaluations, the drawing of data from the sources included. Three quarters of the prompts and nine tenths of "
        "the instructions stand in the training's too, with other scenes and noise; held out are pairs of classes that "
        "no training saw. The spread over seeds leaves out that of the pictures, which are the same for all rows: "
        "0.023 and 0.2 for a score, and less for a difference."
    )
    header = ["row", "edit average", "GenEval overall", "GenEval overall, held out"]

    def lines(members: list[dict]) -> list[list[str]]:
        metrics = (GEDIT, GENEVAL, "geneval_held_out")
        return [[label(row["method"]), *(figure(row, m) for m in metrics), *_cost(row)] for row in members]

    for condition, text in CONDITIONS.items():
        table = lines([row for row in rows if row.get("condition") == condition])
        _bold_best(table, range(1, 4))
        page.table(f"{text}: ± the standard error over seeds.", [*header, *COST], table)
    plain = lines([row for row in rows if row["kind"] == "source"])
    page.table("Base and sources, ± over pictures.", header, [line[:4] for line in plain])
    merges = [row for row in rows if row["kind"] == "merge"]
    table = [[*line[:4], row["chosen"]] for line, row in zip(lines(merges), merges, strict=True)]
    page.table(
        "Every merge that PEFT has, at the weight of each adapter that is best on validation prompts; ± over pictures.",
        [*header, "weight"],
        table,
    )
    trained = {row["method"]: row for row in rows if row["kind"] == "trained" and row.get("curve")}
    if trained:
        _score_plot(page, "A on the miniature", "miniature", trained, "network_evaluations", "network evaluations")


def _merges(page: Page, rows: list[dict]) -> None:
    page.heading("Several LoRAs into one")
    page.text(
        "LoRAs of rank 8 of the miniature, each with a look that it is called by: a background, what things are made "
        "of, a tone, or a style; of eight some contradict each other. A picture's mark is the share of what is asked "
        "that is there in all looks asked for. Kept is the mark over that by hand, where each prompt has the LoRA that "
        "it calls (both of a pair) loaded for it, of means over LoRAs and over pairs; the base's prompts call none. "
        "Merges have the weight that is best on validation prompts. ± the standard error over the sets of prompts and "
        "noise, and over the trainings, where there are several."
    )
    header = ["row", "LoRAs kept", "base kept", "pairs kept", "rank"]
    for count in sorted({row["loras"] for row in rows}):
        members = [row for row in rows if row["loras"] == count]
        table = [
            [
                label(row["method"]) + (f", {row['chosen']:g} each" if "chosen" in row else ""),
                *(figure(row, metric, 2) for metric in ("kept", "base_kept", "pairs")),
                str(row.get("rank", DASH)),
                *_cost(row),
            ]
            for row in members
        ]
        page.table(f"{count} LoRAs.", [*header, *COST], table)
    counts = sorted({row["loras"] for row in rows})
    page.plot(
        "merge",
        "What is kept of the LoRAs' marks, of the base's and of pairs', by the number that is merged; best on top.",
        [partial(_kept, [row for row in rows if row["loras"] == count], f"{count} LoRAs") for count in counts],
        height=4.2,
    )


def _absorbed(page: Page, rows: dict[str, dict]) -> None:
    page.heading("Operators absorbed")
    page.text(
        "The miniature's text-to-image source, an operator over it, and a LoRA student that begins as the source and "
        "asks the operator; GenEval overall on the same prompts and noise. Absorbed is the student's share of the way "
        "from the source to the operator: at one evaluation a step, where the operator takes those of its column. Its "
        "spread leaves out that of the way itself, which is about 0.02 over pictures: where the operator draws hardly "
        "better than the source, the share says little."
    )
    source, lines = rows.get("source_t2i"), []
    for name in OPERATORS:
        student, operator = rows.get(name), rows.get(f"operator_{name}")
        absorbed = DASH
        if source and student and operator:
            low, high = (row[GENEVAL]["mean"] for row in (source, operator))
            shares = [(value - low) / (high - low) for value in student[GENEVAL]["values"]] if high != low else []
            if shares:
                middle, error = mean_error(shares)
                absorbed = f"{middle:.2f}" + ("" if error is None else f" ± {error:.2f}")
        if student or operator:
            each = f"{operator['evaluations']['mean']:.2f}" if operator else DASH
            lines.append(
                [
                    label(name),
                    each,
                    figure(operator, GENEVAL),
                    figure(student, GENEVAL),
                    absorbed,
                    *_cost(student or {}),
                ]
            )
    page.table(
        f"The source alone: {figure(source, GENEVAL)}. ± over pictures, of students over seeds.",
        ["operator", "its evaluations a step", "drawn", "student", "absorbed", *COST],
        lines,
    )
    scales = [(1, GENEVAL), *((scale, f"beta{scale}") for scale in ABSORBED_SCALES if scale != 1)]
    students = {1: source} | {scale: rows.get(f"guided{scale}") for scale in ABSORBED_SCALES if scale != 1}
    table = [[str(a), *(figure(row, metric) for _, metric in scales)] for a, row in students.items() if row]
    page.table(
        "Guidance absorbed against guidance at inference; the first line is the source.",
        ["absorbed scale", *(f"drawn at {scale}" for scale, _ in scales)],
        table,
    )


def _unseen(page: Page, rows: dict[str, dict]) -> None:
    page.heading("Edits of objects that the edit source never saw")
    page.text(
        "The miniature again, with an edit source that saw half of the classes in edits, as the base did; both saw all "
        "of them drawn. Pictures to edit show classes of the one half or of the other. Students begin as the sources' "
        "mean and are asked for edits of the half that the source saw, but for the last."
    )
    metrics = ("gedit_seen", "gedit_unseen", GENEVAL)
    lines = [[label(name), *(figure(row, metric) for metric in metrics), *_cost(row)] for name, row in rows.items()]
    _bold_best(lines, range(1, 4))
    page.table(
        "± over pictures, of students over seeds where there are several.",
        ["row", *(NAMES[metric] for metric in metrics), *COST],
        lines,
    )


SHARES = {"kept": ("LoRAs kept", "#24598f"), "base_kept": ("base kept", "#c1571b"), "pairs": ("pairs kept", "#8a8a8a")}


def _kept(rows: list[dict], title: str, ax) -> None:
    """Draws a row of three dots for each method."""
    rows = sorted(rows, key=lambda row: statistics.fmean(row[metric]["mean"] for metric in SHARES))
    for metric, (name, color) in SHARES.items():
        means, errors = ([row[metric][key] or 0 for row in rows] for key in ("mean", "standard_error"))
        ax.errorbar(means, range(len(rows)), xerr=errors, fmt="o", color=color, label=name, markersize=5)
    ax.set_yticks(range(len(rows)), [label(row["method"]) for row in rows], fontsize=7)
    ax.axvline(1, color=GREY, linewidth=0.8)
    ax.set(xlabel="kept", title=title)


def _score_plot(page: Page, setting: str, file: str, rows: dict, x: str, axis: str) -> None:
    panels = [
        lambda ax, column=column, title=title: _curves(ax, rows, column, title, x, axis)
        for column, title in ((2, "Edit average"), (1, "GenEval overall"))
    ]
    caption = f"Setting {setting}: mean over seeds on the small evaluation set, against {axis}."
    if x == "seconds":
        caption += " A run's seconds are spread evenly over its network evaluations."
    page.plot(f"{file}_{x}", caption, panels, height=4.2)


def _curves(ax, rows: dict, column: int, title: str, x: str, axis: str) -> None:
    for name, row in rows.items():
        curve = np.array(row["curve"])
        scale = row["seconds"] / row["network_evaluations"] if x == "seconds" else 1.0
        ours = name.startswith("danceopd")
        style = {"linewidth": 2.4 if ours else 1.3, "zorder": 3 if ours else 2, "color": COLORS.get(name, GREY)}
        ax.plot(scale * curve[:, 0], curve[:, column], label=label(name), marker="o", markersize=3.2, **style)
    ax.set_title(title)
    ax.set_xlabel(axis)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _ablations(page: Page, rows: dict) -> None:
    page.heading("Ablations")
    page.text(
        "On setting A, each at the same number of network evaluations except where it is said; the first row, in blue, "
        "is the default."
    )
    axes = dict.fromkeys([*AXES, *(row.get("axis", "other") for row in rows.values())])
    for axis in axes:
        members = {n: r for n, r in rows.items() if r.get("axis", "other") == axis}
        if axis != "default" and members:
            title = AXES.get(axis, plain_label(axis))
            page.heading(title, 3)
            rows_of = {n: r for n, r in rows.items() if r.get("axis") == "default"} | members
            _ablation(page, title, f"ablation_{axis}", rows_of, TABLES["ablations"])


def _ablation(page: Page, title: str, file: str, rows: dict, paper: dict | None = None) -> None:
    """Writes rows that differ from the default in one thing, beside what the paper has of them, and a plot."""
    header = ["row", *(["paper: edit", "paper: GenEval"] if paper else []), "edit average", "GenEval overall", *COST]
    lines = [
        [label(n), *(_published_cells(paper, n) if paper else []), figure(r, GEDIT), figure(r, GENEVAL), *_cost(r)]
        for n, r in rows.items()
    ]
    page.table(f"{title}, ± the standard error over seeds.", header, lines)
    metrics = [metric for metric in (GEDIT, GENEVAL) if any(metric in row for row in rows.values())]
    panels = [lambda ax, metric=metric: _dots(ax, rows, metric) for metric in metrics]
    if panels:
        page.plot(file, f"{title}: mean and standard error over seeds.", panels, 1.1 + 0.27 * len(rows))


def _dots(ax, rows: dict, metric: str) -> None:
    """Draws a dot and its error for each row; the default's level goes on as a line."""
    names = [name for name in rows if metric in rows[name]]
    for i, name in enumerate(names):
        value, error = rows[name][metric]["mean"], rows[name][metric].get("standard_error")
        default = rows[name].get("axis") == "default"
        color = COLORS["danceopd"] if default else GREY
        ax.errorbar(value, i, xerr=error, fmt="o", markersize=5.5, color=color, elinewidth=1.3, capsize=2.5)
        if default:
            ax.axvline(value, color=color, linewidth=0.8, linestyle=(0, (5, 3)), zorder=1)
    ax.set_yticks(range(len(names)), [label(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_title(NAMES[metric][:1].upper() + NAMES[metric][1:])
    ax.grid(axis="y", visible=False)


def _plain(page: Page, title: str, rows: dict, metrics: list[str]) -> None:
    page.heading(title)
    lines = [[label(name), *(figure(row, m) for m in metrics), *_cost(row)] for name, row in rows.items()]
    page.table("± over seeds; over pictures where there are none.", ["row", *(NAMES[m] for m in metrics), *COST], lines)


def _guidance(page: Page, rows: dict) -> None:
    page.heading("Setting D: guidance absorbed")
    scales, own = by_scales(rows), own_guidance(rows)
    if own:
        line = ["source, undistilled", *(f"{own[scale]:.3f}" for scale in sorted(own))]
        page.table("GenEval overall of the source under its own guidance.", ["", *map(str, sorted(own))], [line])
    if not scales:
        return
    alphas, betas = (sorted({cell[i] for cell in scales}) for i in (0, 1))
    header = ["trained at alpha", *(f"sampled at beta {b}" for b in betas), *COST]
    students = {a: rows[f"alpha{a}"] for a in alphas}
    lines = [[str(a), *(figure(row, f"beta{b}") for b in betas), *_cost(row)] for a, row in students.items()]
    page.table("GenEval overall of each student under each guidance scale, ± over seeds.", header, lines)
    cells = {cell: statistics.fmean(scores.values()) for cell, scores in scales.items()}
    page.plot(
        "guidance",
        "Left: GenEval overall. Right: the same against the product of both scales, with the source's own guidance.",
        [lambda ax: _heat(ax, cells, alphas, betas), lambda ax: _product(ax, cells, own)],
        height=4.2,
    )


def _heat(ax, cells: dict, alphas: list[int], betas: list[int]) -> None:
    grid = np.full((len(alphas), len(betas)), np.nan)
    for (a, b), value in cells.items():
        grid[alphas.index(a), betas.index(b)] = value
        place, color = (betas.index(b) + 0.5, alphas.index(a) + 0.5), "white" if value > 0.55 else "#1b1b1b"
        ax.text(*place, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    ax.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(np.arange(len(betas)) + 0.5, [str(b) for b in betas])
    ax.set_yticks(np.arange(len(alphas)) + 0.5, [str(a) for a in alphas])
    ax.set_xlabel("inference scale beta")
    ax.set_ylabel("training scale alpha")
    ax.grid(visible=False)
    ax.set_title("GenEval overall")


def _product(ax, cells: dict, own: dict[int, float]) -> None:
    alphas = sorted({a for a, _ in cells})
    for alpha, color in zip(alphas, matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(alphas))), strict=True):
        points = sorted((a * b, value) for (a, b), value in cells.items() if a == alpha)
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=color, marker="o", markersize=4, linewidth=1.2, label=f"trained at {alpha}")
    if own:
        ax.plot(
            sorted(own), [own[s] for s in sorted(own)], color="#1b1b1b", linestyle="--", label="source, undistilled"
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("alpha x beta")
    ax.set_title("GenEval overall")


def _untuned(rows: dict) -> str:
    """Says which methods of the miniature's table have a learning rate that no grid chose."""
    tuned = {name.partition("@")[0] for name in rows}
    others = [f"{label(name)} {MINIATURE_RATES[name]:g}" for name in MINIATURE if name not in tuned]
    return "No lower rates were tried. Without a grid: " + ", ".join(others) + "." if others else ""


def _grid(page: Page, title: str, more: str, rows: dict) -> None:
    page.heading(title)
    chosen = "Each method on validation prompts, one seed. In bold the chosen one, the best by GenEval + edit / 10."
    page.text(f"{chosen} {more}".strip())
    methods = rates(rows)
    columns = sorted({rate for cells in methods.values() for rate in cells})
    lines = []
    for method, cells in methods.items():
        best, line = chosen_rate(cells), [label(method)]
        for rate in columns:
            row = cells.get(rate)
            text = f"{figure(row, GEDIT, 2)} / {figure(row, GENEVAL, 3)}" if row else DASH
            line.append(f"**{text}**" if rate == best else text)
        lines.append(line)
    page.table("Edit average / GenEval overall.", ["method", *(f"{rate:g}" for rate in columns)], lines)


def _again(page: Page, files: dict[str, dict]) -> None:
    """Says how to make it all anew, and what it took: budget and commits of each table, the machines."""
    page.heading("Again")
    page.text("`danceopd reproduce all --budget paper` makes all of it; a killed run goes on where it was.")
    lines, machines = [], {}
    for name, file in files.items():
        budget = file.get("budget", {})
        rows = {
            (row["method"], row.get("loras")): row for row in file.get("rows", ())
        }.values()  # once for all conditions
        runs = [run for row in rows for run in row.get("runs", ())]
        commits = {c for row in rows if row.get("commit") for c in row["commit"].split(", ")}
        took = duration(sum(run.get("seconds", 0) for run in runs)) if runs else DASH
        amount = _amount(budget, "network_evaluations")
        plan = [budget.get("name", DASH), str(budget.get("seeds", DASH)), amount]
        lines.append([name, *plan, str(len(runs)), took, ", ".join(sorted(commits)) or DASH])
        machine = tuple((plain_label(key), str(value)) for key, value in file.get("machine", {}).items())
        machines.setdefault(machine, []).append(name)
    header = ["table", "budget", "seeds", "network evaluations a run", "runs", "training of all of them", "commits"]
    note = 'One forward of a source that is guided is counted once, though it asks both branches. "+" after a commit: '
    page.table(f"{note}some files differed from it.", header, lines)
    for machine, names in machines.items():
        page.table(f"Machine of {', '.join(names)}.", ["", ""], [list(fact) for fact in machine])


def _figure(panels: list[Callable], height: float) -> Figure:
    """Draws panels side by side, with one legend under them for what they name."""
    with matplotlib.rc_context(CHART_STYLE):
        made = Figure(figsize=(10.4, height), layout="constrained")
        made.get_layout_engine().set(w_pad=0.08, wspace=0.04)
        axes = np.atleast_1d(made.subplots(1, len(panels)))
        for draw, ax in zip(panels, axes, strict=True):
            draw(ax)
        named = {text: line for ax in axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
        if named:
            made.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8.5)
    return made


def write_report(folder: Path) -> list[Path]:
    """Writes REPORT.md and plots/*.png beside the results files of a folder; returns their paths."""
    page = build(read(folder))
    written = [folder / "REPORT.md"]
    for name, made in page.plots.items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(CHART_STYLE):
            made.savefig(buffer, format="png", dpi=110)
        written.append(folder / "plots" / f"{name}.png")
        write_atomic(written[-1], buffer.getvalue())
    write_atomic(written[0], page.markdown().encode())
    return written
