"""results/REPORT.md and results/report.html: the paper's tables beside ours, its claims, every ablation as a plot.

Both pages are made of the same blocks; what has not been run yet is left out or said to be missing.
"""

import io
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from danceopd.checkpoint import write_atomic
from danceopd.evaluation.report import CHART_STYLE, DASH, duration
from danceopd.evaluation.report import label as plain_label
from danceopd.reproduce.paper import STYLE_GAP_CLOSED, TABLES

GENEVAL, GEDIT = "geneval_overall", "gedit_average"
NAMES = {
    GENEVAL: "GenEval overall",
    GEDIT: "edit average",
    "style_share": "share of sketches",
    "sketch_overall": "GenEval overall, sketch prompts",
    "local_average": "local edits",
    "global_average": "global edits",
    "guided_overall": "GenEval overall, guidance 2",
}
COMPARED = (
    "joint",
    "weight_merge",
    "off_policy",
    "off_policy_samples",
    "diffusion_opd",
    "flow_opd",
    "flow_opd_attached",
)
KEPT = 0.98  # of the T2I source's overall
TIE = 0.02  # of two learning rates
REPRODUCED, NOT, UNDECIDED, MISSING = "reproduced", "not reproduced", "undecided at this noise", "not run yet"
ROWS = {
    "soft": "mean of the sources",
    "mid_t": "mid t",
    "high_t": "high t",
    "kl": "KL-weighted",
    "clean": "clean estimate's error",
    "clean_uniform": "clean estimate's error, uniform query",
    "dmd": "DMD-style",
    "sds": "SDS-style",
    "ab2_steps4": "Adams-Bashforth, 4 steps",
    "ab2_steps8": "Adams-Bashforth, 8 steps",
    "pool2": "pooled trajectories, 2 visits",
    "pool3": "pooled trajectories, 3 visits",
    "merge_uniform": "uniform merge",
    "merge_weighted": "weighted merge",
    "merge_lora_dare_ties": "LoRA merge, dare_ties",
}
AXES = {
    "routing": "Routing",
    "query": "Which state is asked",
    "queries": "Queries of one trajectory",
    "rollout": "Rollout steps",
    "objective": "Objective",
    "data": "Size of the data",
    "updates": "Methods at equal updates",
    "beyond": "Beyond the paper's recipe",
}


def label(name: str) -> str:
    """The printed form of a row's name."""
    if name in ROWS:
        return ROWS[name]
    if match := re.fullmatch(r"(\w+)_(500|20000)", name):
        return f"{plain_label(match[1])}, {match[2]} samples each"
    if match := re.fullmatch(r"(\w+)_updates", name):
        return f"{plain_label(match[1])}, 340 updates"
    if match := re.fullmatch(r"(k|steps|alpha)(\d+)", name):
        return {"k": "K = ", "steps": "rollout steps: ", "alpha": "guidance "}[match[1]] + match[2]
    if match := re.fullmatch(r"merge_lora_(\w+)", name):
        return f"LoRA merge, {match[1]}"
    return plain_label(name)


# ------------------------------------------------------------------------------------------------ figures


def load(folder: Path) -> dict[str, dict[str, dict]]:
    """{table: {row: ...}} of the results files that are there."""
    tables = {}
    for name in ("A", "B", "C", "D", "E", "F", "ablations", "grid"):
        path = folder / f"{name}.json"
        if path.exists():
            tables[name] = {row["method"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    return tables


def mean(row: dict | None, metric: str) -> float | None:
    return row[metric]["mean"] if row and metric in row else None


def figure(row: dict | None, metric: str, digits: int | None = None) -> str:
    """ "0.891 ± 0.004", or a dash."""
    if not row or metric not in row:
        return DASH
    digits = (2 if metric.endswith("_average") else 3) if digits is None else digits
    error = row[metric].get("standard_error")
    text = f"{row[metric]['mean']:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def difference(a: dict | None, b: dict | float | None, metric: str) -> tuple[float, float | None] | None:
    """Mean of a - b and its standard error over seeds: by seed where both have the same (they share the evaluation's
    prompts and noise), else of two independent means; None where a figure is missing, error None for one seed."""
    if not a or b is None or metric not in a or (isinstance(b, dict) and metric not in b):
        return None
    ours = a[metric]["values"]
    theirs = [b] * len(ours) if isinstance(b, float) else b[metric]["values"]
    paired = isinstance(b, float) or not b["seeds"] or b["seeds"] == a["seeds"]
    if paired:
        theirs = theirs if len(theirs) == len(ours) else theirs * len(ours)
        gaps = [x - y for x, y in zip(ours, theirs, strict=True)]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        return statistics.fmean(gaps), error
    if min(len(ours), len(theirs)) < 2:
        return statistics.fmean(ours) - statistics.fmean(theirs), None
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    return statistics.fmean(ours) - statistics.fmean(theirs), error


def verdict(gap: tuple[float, float | None] | None) -> str:
    """Decided where the difference is two standard errors from nothing."""
    if gap is None:
        return MISSING
    value, error = gap
    if error is None or abs(value) < 2 * error or value == 0:
        return UNDECIDED
    return REPRODUCED if value > 0 else NOT


def signed(gap: tuple[float, float | None], digits: int) -> str:
    value, error = gap
    return f"{value:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


# ------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """What the paper says, what came out, and the figures."""

    text: str
    verdict: str
    figures: str


def claims(tables: dict) -> list[Claim]:
    """A line for every claim of the paper."""
    found = []
    for setting in "AB":
        found += _setting_claims(setting, tables.get(setting, {}))
    rows = tables.get("ablations", {})
    ours = rows.get("danceopd")
    found.append(_beats("A hard route beats the mean of the sources", ours, rows, ["soft"]))
    found.append(
        _beats("A query near the data beats one in the middle or near the noise", ours, rows, ["mid_t", "high_t"])
    )
    found.append(_beats("One query beats four and sixteen", ours, rows, ["k4", "k16"]))
    found.append(
        _beats("Plain MSE beats weighted errors", ours, rows, ["sigma_sqrt", "logit_normal", "mode", "cosmap", "kl"])
    )
    found.append(
        _beats("Plain MSE beats DMD-, SDS-style and consistency losses", ours, rows, ["dmd", "sds", "consistency"])
    )
    return [*found, _style_claim(tables.get("C", {})), _guidance_claim(tables.get("D", {}))]


def _beats(text: str, ours: dict | None, rows: dict, others: list[str], metric: str = GEDIT) -> Claim:
    """Ours against each of the others: reproduced if it beats all, not if one of them beats it."""
    gaps = {name: difference(ours, rows.get(name), metric) for name in others}
    verdicts = [verdict(gap) for gap in gaps.values()]
    overall = next((v for v in (NOT, MISSING, UNDECIDED) if v in verdicts), REPRODUCED)
    digits = 3 if metric == GENEVAL else 2
    parts = [f"{label(name)} {signed(gap, digits)}" for name, gap in gaps.items() if gap]
    return Claim(text, overall, f"{NAMES[metric]}, ours minus theirs: " + ", ".join(parts) if parts else "")


def _setting_claims(setting: str, rows: dict) -> list[Claim]:
    ours, source = rows.get("danceopd"), mean(rows.get("source_t2i"), GENEVAL)
    others = [name for name in COMPARED if name in rows] or ["joint"]
    kept = difference(ours, None if source is None else KEPT * source, GENEVAL)
    share = f"{mean(ours, GENEVAL) / source:.3f} of the source's {source:.3f}" if kept and source else ""
    result = [
        _beats(f"{setting}: DanceOPD has the best edit average", ours, rows, others),
        _beats(f"{setting}: DanceOPD has the best GenEval overall", ours, rows, others, GENEVAL),
        Claim(f"{setting}: DanceOPD keeps at least {KEPT} of the T2I source's overall", verdict(kept), share),
    ]
    for other in ("diffusion_opd", "flow_opd", "flow_opd_attached"):
        factor = cheaper(ours, rows.get(other))
        text = f"{setting}: DanceOPD reaches the best of {label(other)} in fewer network evaluations"
        if factor is None:
            result.append(Claim(text, MISSING, ""))
        else:
            figures = {0.0: "from the start", math.inf: "never"}.get(factor) or f"{1 / factor:.1f} times fewer"
            result.append(Claim(text, REPRODUCED if factor < 1 else NOT, figures))
    return result


def merit(point: list[float]) -> float:
    """One number of a point of a curve: GenEval overall plus a tenth of the edit average."""
    return point[1] + point[2] / 10


def cheaper(ours: dict | None, theirs: dict | None) -> float | None:
    """The share of the evaluations in which our curve first reaches the best point of theirs (see `merit`).

    Between points the curve is a straight line. Infinite if it does not; None without curves.
    """
    if not ours or not theirs or "curve" not in ours or "curve" not in theirs:
        return None
    best = max(theirs["curve"], key=merit)
    if best[0] == 0:
        return 0.0 if merit(ours["curve"][0]) >= merit(best) else math.inf
    for before, after in zip(ours["curve"], ours["curve"][1:], strict=False):
        if merit(after) >= merit(best):
            part = (merit(best) - merit(before)) / max(merit(after) - merit(before), 1e-12)
            return (before[0] + max(part, 0) * (after[0] - before[0])) / best[0]
    return math.inf


def _style_claim(rows: dict) -> Claim:
    text = f"C: the student closes {100 * STYLE_GAP_CLOSED:.1f} % of its gap to the style source"
    before, source, ours = (mean(rows.get(n), "style_share") for n in ("source_t2i", "source_style", "danceopd"))
    if None in (before, source, ours) or source == before:
        return Claim(text, MISSING, "")
    gap = [(v - before) / (source - before) for v in rows["danceopd"]["style_share"]["values"]]
    error = statistics.stdev(gap) / math.sqrt(len(gap)) if len(gap) > 1 else None
    kept = f"GenEval overall {figure(rows['source_t2i'], GENEVAL)} before, {figure(rows['danceopd'], GENEVAL)} after"
    share = statistics.fmean(gap)
    figures = f"{100 * share:.1f} %" + (f" ± {100 * error:.1f}" if error is not None else "") + f"; {kept}"
    reached = share >= STYLE_GAP_CLOSED - 2 * (error or 0)
    return Claim(text, UNDECIDED if error is None else REPRODUCED if reached else NOT, figures)


def _scales(rows: dict) -> list[tuple[int, int, float]]:
    """(alpha, beta, score) of setting D's students."""
    return [
        (int(name.removeprefix("alpha")), int(metric.removeprefix("beta")), row[metric]["mean"])
        for name, row in rows.items()
        if name.startswith("alpha")
        for metric in row
        if metric.startswith("beta")
    ]


def _guidance_claim(rows: dict) -> Claim:
    text = "D: absorbed and inference guidance multiply"
    base, cells = rows.get("base", {}), _scales(rows)
    pairs = [(a, b, v, base[f"beta{a * b}"]["mean"]) for a, b, v in cells if f"beta{a * b}" in base]
    if not pairs:
        return Claim(text, MISSING, "")
    apart = statistics.fmean(abs(v - source) for _, _, v, source in pairs)
    # Against it: the inference scale alone, as if nothing had been absorbed.
    alone = statistics.fmean(abs(v - base[f"beta{b}"]["mean"]) for _, b, v, _ in pairs)
    plain = base["beta1"]["mean"]
    over = [a * b for a, b, v in cells if v < plain]
    onset = f"; below the unguided {plain:.3f} from a product of {min(over)}" if over else ""
    best = max(cells, key=lambda c: c[2])
    figures = (
        f"student at (alpha, beta) against the source at alpha x beta: {apart:.3f} apart on average, "
        f"against the source at beta alone {alone:.3f}; best {best[2]:.3f} at alpha {best[0]}, beta {best[1]}{onset}"
    )
    return Claim(text, REPRODUCED if apart < alone / 2 else UNDECIDED if apart < alone else NOT, figures)


# ------------------------------------------------------------------------------------------------- blocks


@dataclass
class Page:
    """Blocks in order: ("heading", level, text), ("text", text), ("table", caption, header, rows), ("plot", ...)."""

    blocks: list[tuple] = field(default_factory=list)

    def heading(self, text: str, level: int = 2) -> None:
        self.blocks.append(("heading", level, text))

    def text(self, text: str) -> None:
        self.blocks.append(("text", text))

    def table(self, caption: str, header: list[str], rows: list[list[str]]) -> None:
        if rows:
            self.blocks.append(("table", caption, header, rows))

    def plot(self, name: str, caption: str, panels: list[Callable]) -> None:
        if panels:
            self.blocks.append(("plot", name, caption, _figure(panels)))


def build(tables: dict, about: dict) -> Page:
    """The whole report."""
    page = Page()
    found = claims(tables)
    against = [claim for claim in found if claim.verdict == NOT]
    page.text(_summary(found))
    if against:
        page.heading("What contradicts the paper")
        page.table("", ["claim", "figures"], [[c.text, c.figures] for c in against])
    page.heading("Every claim")
    page.text(
        "A difference counts as decided at two standard errors over the seeds, taken seed by seed where both rows have "
        "the same seeds: these share the evaluation's prompts and noise. Published figures are on GEdit-Bench and "
        "GenEval with large models, ours on the picture world: only orders can be compared, not numbers."
    )
    page.table("", ["claim", "verdict", "figures"], [[c.text, c.verdict, c.figures] for c in found])
    for setting, title in (("A", "Setting A: text-to-image and edit"), ("B", "Setting B: local and global edit")):
        if setting in tables:
            _methods(page, setting, title, tables[setting])
    if "ablations" in tables:
        _ablations(page, tables["ablations"])
    if "C" in tables:
        _plain(page, "Setting C: a style absorbed", tables["C"], [GENEVAL, "style_share", "sketch_overall"])
    if "D" in tables:
        _guidance(page, tables["D"])
    if "E" in tables:
        metrics = [GENEVAL, "local_average", "global_average", "style_share", "guided_overall"]
        _plain(page, "Setting E: five capabilities at once", tables["E"], metrics)
    if "F" in tables:
        _plain(page, "Setting F: a capability added later", tables["F"], [GENEVAL, GEDIT, "style_share"])
        page.text("before: setting A's students. without_self: the new source alone, so what was there is forgotten.")
    if "grid" in tables:
        _grid(page, tables["grid"])
    page.heading("Again")
    page.text("`danceopd reproduce all --budget paper` makes all of it; a killed run goes on where it was.")
    page.table("", ["", ""], [[plain_label(key), str(value)] for key, value in about.items()])
    return page


def _summary(found: list[Claim]) -> str:
    counts = {v: sum(c.verdict == v for c in found) for v in (REPRODUCED, NOT, UNDECIDED, MISSING)}
    return f"Of {len(found)} claims: " + ", ".join(f"{n} {v}" for v, n in counts.items() if n) + "."


def _cost(row: dict) -> list[str]:
    if not row.get("network_evaluations"):
        return ["", "", "", row.get("commit", "")]
    return [
        f"{row['network_evaluations']:,.0f}",
        f"{row['updates']:,.0f}" if "updates" in row else "",
        f"{row['seconds']:,.0f}",
        row.get("commit", ""),
    ]


def _methods(page: Page, setting: str, title: str, rows: dict) -> None:
    page.heading(title)
    paper = TABLES[setting]
    lines = []
    for name, row in rows.items():
        edit, t2i = paper.get(name, (None, None))
        published = [DASH if edit is None else f"{edit:.3f}", DASH if t2i is None else f"{t2i:.3f}"]
        note = f" ({label(row['chosen'])})" if "chosen" in row else ""
        seeds = str(len(row["seeds"])) if row["seeds"] else ""
        lines.append([label(name) + note, *published, figure(row, GEDIT), figure(row, GENEVAL), seeds, *_cost(row)])
    header = ["row", "paper: edit", "paper: GenEval", "edit average", "GenEval overall", "seeds"]
    page.table(
        "± the standard error over seeds; for rows without seeds, over pictures.",
        [*header, "network evaluations", "updates", "seconds", "commit"],
        lines,
    )
    curved = {name: row for name, row in rows.items() if "curve" in row}
    if curved:
        for x, axis in (("evaluations", "network evaluations"), ("seconds", "seconds of training")):
            panels = [
                lambda ax, m=m, t=t, x=x, axis=axis: _curves(ax, curved, m, t, x, axis)
                for m, t in ((1, "GenEval overall"), (2, "Edit average"))
            ]
            page.plot(
                f"{setting}_{x}", f"Setting {setting}: mean over seeds, small evaluation set, against {axis}.", panels
            )


def _curves(ax, rows: dict, column: int, title: str, x: str, axis: str) -> None:
    for name, row in rows.items():
        curve = np.array(row["curve"])
        scale = row["seconds"] / row["network_evaluations"] if x == "seconds" else 1.0
        wide = name.startswith("danceopd")
        ax.plot(scale * curve[:, 0], curve[:, column], label=label(name), linewidth=2.4 if wide else 1.2, marker=".")
    ax.set_title(title)
    ax.set_xlabel(axis)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.legend(fontsize=7.5)


def _ablations(page: Page, rows: dict) -> None:
    page.heading("Ablations")
    page.text(
        "On setting A, each at the same number of network evaluations except where it is said; the first bar is the "
        "default."
    )
    known = {axis for axis in AXES if any(row.get("axis") == axis for row in rows.values())}
    for axis in [a for a in AXES if a in known]:
        members = {n: r for n, r in rows.items() if r.get("axis") in ("default", axis)}
        page.heading(AXES[axis], 3)
        published = TABLES["ablations"]
        page.table(
            "",
            ["row", "paper: edit", "edit average", "GenEval overall", "seeds", "updates", "commit"],
            [
                [
                    label(name),
                    f"{published[name][0]:.3f}" if name in published else DASH,
                    figure(row, GEDIT),
                    figure(row, GENEVAL),
                    str(len(row["seeds"])),
                    f"{row['updates']:,.0f}",
                    row["commit"],
                ]
                for name, row in members.items()
            ],
        )
        panels = [lambda ax, m=m, members=members: _bars(ax, members, m) for m in (GEDIT, GENEVAL)]
        page.plot(f"ablation_{axis}", f"{AXES[axis]}: mean and standard error over seeds.", panels)


def _bars(ax, rows: dict, metric: str) -> None:
    names = [n for n in rows if metric in rows[n]]
    values = [rows[n][metric]["mean"] for n in names]
    errors = [rows[n][metric]["standard_error"] or 0 for n in names]
    colors = ["#24598f" if rows[n].get("axis") == "default" else "#a9bfd6" for n in names]
    ax.barh(range(len(names)), values, xerr=errors, color=colors, error_kw={"linewidth": 1})
    ax.set_yticks(range(len(names)), [label(n) for n in names])
    ax.invert_yaxis()
    low, high = min(v - e for v, e in zip(values, errors)), max(v + e for v, e in zip(values, errors))  # noqa: B905
    ax.set_xlim(max(0, low - 0.6 * (high - low) - 0.01), high + 0.1 * (high - low) + 0.001)
    ax.axvline(values[0], color="#24598f", linewidth=0.8, linestyle="--")
    ax.set_title(NAMES[metric])
    ax.grid(axis="y", visible=False)


def _plain(page: Page, title: str, rows: dict, metrics: list[str]) -> None:
    page.heading(title)
    page.table(
        "",
        ["row", *(NAMES[m] for m in metrics), "seeds", "network evaluations", "updates", "seconds", "commit"],
        [
            [label(name), *(figure(row, m) for m in metrics), str(len(row["seeds"]) or ""), *_cost(row)]
            for name, row in rows.items()
        ],
    )


def _guidance(page: Page, rows: dict) -> None:
    page.heading("Setting D: guidance absorbed")
    cells = _scales(rows)
    if not cells:
        return
    alphas, betas = (sorted({c[i] for c in cells}) for i in (0, 1))
    header = ["training scale", *(f"sampled at {b}" for b in betas), "commit"]
    lines = [
        [str(a), *(figure(rows[f"alpha{a}"], f"beta{b}") for b in betas), rows[f"alpha{a}"]["commit"]] for a in alphas
    ]
    page.table("GenEval overall of each student under each guidance scale.", header, lines)
    page.plot(
        "guidance",
        "Left: GenEval overall. Right: the same against the product of both scales, with the source's own guidance.",
        [lambda ax: _heat(ax, cells, alphas, betas), lambda ax: _product(ax, cells, rows.get("base", {}))],
    )


def _heat(ax, cells, alphas, betas) -> None:
    grid = np.full((len(alphas), len(betas)), np.nan)
    for a, b, value in cells:
        grid[alphas.index(a), betas.index(b)] = value
        ax.text(betas.index(b) + 0.5, alphas.index(a) + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=9)
    ax.pcolormesh(grid, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(np.arange(len(betas)) + 0.5, [str(b) for b in betas])
    ax.set_yticks(np.arange(len(alphas)) + 0.5, [str(a) for a in alphas])
    ax.set_xlabel("inference guidance scale")
    ax.set_ylabel("training guidance scale")
    ax.grid(visible=False)
    ax.set_title("GenEval overall")


def _product(ax, cells, base: dict) -> None:
    for alpha in sorted({a for a, _, _ in cells}):
        points = sorted((a * b, v) for a, b, v in cells if a == alpha)
        ax.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.1, label=f"trained at {alpha}")
    own = sorted((int(k.removeprefix("beta")), v["mean"]) for k, v in base.items() if k.startswith("beta"))
    if own:
        ax.plot(*zip(*own, strict=True), color="#1b1b1b", linestyle="--", linewidth=1.2, label="source, undistilled")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("product of the scales")
    ax.set_title("GenEval overall")
    ax.legend(fontsize=8)


def rates(rows: dict) -> dict[str, dict[float, dict]]:
    """{method: {learning rate: row}} of the grid."""
    result: dict[str, dict[float, dict]] = {}
    for name, row in rows.items():
        method, _, rate = name.partition("@")
        result.setdefault(method, {})[float(rate)] = row
    return result


def chosen_rate(rows: dict[float, dict]) -> float:
    """The largest rate within TIE of the best by `merit`: longer runs do better at it than the grid's short ones."""
    scores = {rate: merit([0, mean(row, GENEVAL), mean(row, GEDIT)]) for rate, row in rows.items()}
    return max(rate for rate, score in scores.items() if score >= max(scores.values()) - TIE)


def _grid(page: Page, rows: dict) -> None:
    page.heading("Learning rates")
    page.text(
        f"Each method on validation prompts, one seed. In bold the chosen one: the largest within {TIE} (about the "
        "error of the pictures) of the best by GenEval + edit / 10. Where the lowest was best, lower ones were added."
    )
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


# ------------------------------------------------------------------------------------------------- output


def _figure(panels: list[Callable]) -> Figure:
    with matplotlib.rc_context(CHART_STYLE):
        made = Figure(figsize=(10.4, 3.6), layout="constrained")
        for draw, ax in zip(panels, np.atleast_1d(made.subplots(1, len(panels))), strict=True):
            draw(ax)
    return made


def _saved(made: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(CHART_STYLE):
        made.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def to_markdown(page: Page) -> str:
    lines = ["# The paper's claims on the picture world", ""]
    for kind, *rest in page.blocks:
        if kind == "heading":
            lines += ["#" * rest[0] + " " + rest[1], ""]
        elif kind == "text":
            lines += [rest[0], ""]
        elif kind == "plot":
            lines += [f"![{rest[1]}](plots/{rest[0]}.png)", "", rest[1], ""]
        else:
            caption, header, rows = rest
            cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
            lines += [caption, ""] if caption else []
            lines += ["| " + " | ".join(cells[0]) + " |", "|" + " --- |" * len(header)]
            lines += ["| " + " | ".join(row) + " |" for row in cells[1:]] + [""]
    return "\n".join(lines)


def _markup(text: str) -> Markup:
    """**bold** and `code`, and nothing else."""
    parts = str(escape(text)).split("**")
    bold = "".join(f"<b>{p}</b>" if i % 2 else p for i, p in enumerate(parts))
    return Markup("".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(bold.split("`"))))


def to_html(page: Page) -> str:
    blocks = []
    for kind, *rest in page.blocks:
        if kind == "plot":
            svg = _saved(rest[2], "svg").decode()
            svg = svg[svg.index("<svg") :]
            for before in (' id="', 'href="#', "url(#"):
                svg = svg.replace(before, f"{before}{rest[0]}-")
            blocks.append((kind, Markup(svg), rest[1]))
        else:
            blocks.append((kind, *rest))
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markup"] = _markup
    return environment.get_template("report.html.j2").render(blocks=blocks)


def write_report(folder: Path) -> list[Path]:
    """Write REPORT.md, report.html and plots/*.png beside the results files of a folder; return their paths."""
    tables, about = load(folder), {}
    for name in tables:
        whole = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        about |= whole["machine"] | {"budget": whole["budget"]["name"]}
        seconds = sum(run["seconds"] for row in whole["rows"] for run in row.get("runs", ()))
        about[f"training of {name}, all runs"] = duration(seconds)
    page = build(tables, about)
    written = [folder / "REPORT.md", folder / "report.html"]
    write_atomic(written[0], to_markdown(page).encode())
    write_atomic(written[1], to_html(page).encode())
    for kind, *rest in page.blocks:
        if kind == "plot":
            written.append(folder / "plots" / f"{rest[0]}.png")
            write_atomic(written[-1], _saved(rest[2], "png"))
    return written
