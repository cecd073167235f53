"""Reads the results files: a row's figures, differences by seed and their verdicts, curves, learning rates.

And keeps what is measured on the way to them.
"""

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from danceopd.report.names import DASH
from danceopd.report.names import label as plain_label
from danceopd.reproduce.matrix import SETTINGS
from danceopd.support.files import write_atomic
from danceopd.support.texts import read_object

GENEVAL, GEDIT = "geneval_overall", "gedit_average"

NAMES = {
    GENEVAL: "GenEval overall",
    GEDIT: "edit average",
    "style_share": "share of sketches",
    "sketch_overall": "GenEval overall, sketch prompts",
    "local_average": "local edits",
    "global_average": "global edits",
    "guided_overall": "GenEval overall, guidance 2",
    "gedit_seen": "edits of objects that the edit source saw",
    "gedit_unseen": "edits of objects that it never saw",
}

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
    "no_average": "the last weights, not their mean",
    "more_t2i": "two text-to-image samples to an edit",
    "from_base": "from the base",
    "pool2": "pooled trajectories, 2 visits",
    "pool3": "pooled trajectories, 3 visits",
    "guided2": "guidance 2",
    "guided3": "guidance 3",
    "interval": "guidance 3 where 0.2 <= sigma <= 0.9",
    "rescale": "guidance 3, rescale 0.7",
    "zero_star": "CFG-Zero*, 3",
    "apg": "APG, 3",
    "autoguided": "autoguidance by the base, 2",
    "difference": "1.5 of the LoRA",
    "skip_layers": "without block 1, 1 where 0.5 <= sigma",
    "by_sigma": "guidance 3 where 0.7 <= sigma",
    "mean": "mean of the LoRA and the base at guidance 3",
    "one_to_one": "one text-to-image sample to an edit",
    "two_to_one": "two text-to-image samples to an edit",
    "one_to_two": "one text-to-image sample to two edits",
    "all_objects": "one to one, asked for edits of all objects",
    "source_edit_all": "edit source that saw all objects",
    "by_hand": "by hand, for each prompt",
    "sum": "sum",
    "sum_cut": "sum, cut to the rank",
    "merge_uniform": "uniform merge",
    "merge_weighted": "weighted merge",
    "merge_lora_dare_ties": "LoRA merge, dare_ties",
}

REPRODUCED, NOT, UNDECIDED, MISSING = "reproduced", "not reproduced", "undecided at this noise", "not run yet"


def label(name: str) -> str:
    """Returns the printed form of a row's name."""
    if name in ROWS:
        return ROWS[name]
    if match := re.fullmatch(r"(\w+)_(500|2000|20000)", name):
        return f"{plain_label(match[1])}, {match[2]} samples each"
    if match := re.fullmatch(r"(\w+)_updates", name):
        return f"{plain_label(match[1])}, 340 updates"
    if match := re.fullmatch(r"(\w+)_from_merge", name):
        return f"{plain_label(match[1])}, from the sources' mean"
    if match := re.fullmatch(r"(k|steps|alpha)(\d+)", name):
        return {"k": "K = ", "steps": "rollout steps: ", "alpha": "guidance "}[match[1]] + match[2]
    if match := re.fullmatch(r"merge_lora_(\w+)", name):
        return f"LoRA merge, {match[1]}"
    if match := re.fullmatch(r"merge_(\w+)", name):
        return f"merge, {match[1]}"
    return plain_label(name)


def read(folder: Path) -> dict[str, dict]:
    """Reads {table: its results file} of those that are there."""
    paths = {name: folder / f"{name}.json" for name in SETTINGS}
    again = "restore it, or remove it to gather it again"
    return {name: read_object(path, again) for name, path in paths.items() if path.exists()}


def tables_of(files: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Returns {table: {row's name: row}} of results files by table."""
    return {name: {row["method"]: row for row in file.get("rows", ())} for name, file in files.items()}


def mean(row: dict | None, metric: str) -> float | None:
    """Returns a metric's mean, None where there is none."""
    return row[metric]["mean"] if row and metric in row else None


def once(path: Path, make: Callable[[], dict]) -> dict:
    """Returns what a JSON file holds, which is made where there is none."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(make()) + "\n").encode())
    return read_object(path, "remove it, and it is made again")


def figure(row: dict | None, metric: str, digits: int | None = None) -> str:
    """Writes "0.891 ± 0.004", or a dash."""
    if not row or metric not in row:
        return DASH
    edits = metric.startswith("gedit_") or metric.endswith("_average")  # from 0 to 10
    digits = (2 if edits else 3) if digits is None else digits
    error = row[metric].get("standard_error")
    text = f"{row[metric]['mean']:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


Scores = dict[int | None, float]  # by seed; {None: score} of a row that was not trained


def by_seed(row: dict | None, metric: str) -> Scores:
    """Returns a row's scores; empty where there are none."""
    if not row or metric not in row:
        return {}
    values = row[metric].get("values") or [row[metric]["mean"]]
    seeds = row.get("seeds") or ([None] if len(values) == 1 else range(len(values)))
    return dict(zip(seeds, values, strict=False))


def mean_error(values: list[float]) -> tuple[float, float | None]:
    """Returns mean and its standard error, None for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def difference(ours: Scores, theirs: Scores, share: float = 1.0) -> tuple[float, float | None] | None:
    """Returns the mean of ours - share * theirs, and its standard error over seeds.

    It is taken seed by seed where both have the same (they share the evaluation's prompts and noise), or theirs needed
    no training; else from two independent means. None where a figure is missing, error None for one seed.
    """
    if not ours or not theirs:
        return None
    if None in theirs:
        theirs = dict.fromkeys(ours, theirs[None])
    if ours.keys() == theirs.keys():
        return mean_error([ours[seed] - share * theirs[seed] for seed in ours])
    a, a_error = mean_error(list(ours.values()))
    b, b_error = mean_error([share * value for value in theirs.values()])
    return a - b, None if a_error is None or b_error is None else math.hypot(a_error, b_error)


def verdict(gap: tuple[float, float | None] | None) -> str:
    """Decides where the difference is two standard errors from nothing."""
    if gap is None:
        return MISSING
    value, error = gap
    if error is None or abs(value) < max(2 * error, 1e-12):
        return UNDECIDED
    return REPRODUCED if value > 0 else NOT


def seeds_needed(gap: tuple[float, float | None], seeds: int) -> int | None:
    """Estimates how many seeds would put a difference two standard errors from nothing, if its mean and its spread over
    seeds stay what they are; None where no number would, or the spread is not known."""
    value, error = gap
    if error is None or abs(value) < 1e-12:
        return None
    return math.ceil(seeds * (2 * error / value) ** 2)


def signed(gap: tuple[float, float | None], digits: int) -> str:
    """Writes a difference with its sign and its error."""
    value, error = gap
    return f"{value:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def merit(point: list[float]) -> float:
    """Returns one number of a point of a curve: GenEval overall plus a tenth of the edit average."""
    return point[1] + point[2] / 10


def cheaper(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Returns the share of the evaluations in which our curve first reaches the best point of theirs (see `merit`).

    Between points the curve is a straight line. Infinite if it does not reach it.
    """
    best = max(theirs, key=merit)
    if merit(ours[0]) >= merit(best):
        return 0.0
    for before, after in itertools.pairwise(ours):
        if merit(after) >= merit(best) and best[0] > 0:
            part = (merit(best) - merit(before)) / (merit(after) - merit(before))
            return (before[0] + part * (after[0] - before[0])) / best[0]
    return math.inf


def rates(rows: dict) -> dict[str, dict[float, dict]]:
    """Returns {method: {learning rate: row}} of the grid."""
    result: dict[str, dict[float, dict]] = {}
    for name, row in rows.items():
        method, _, rate = name.partition("@")
        result.setdefault(method, {})[float(rate)] = row
    return result


def chosen_rate(rows: dict[float, dict]) -> float:
    """Returns the rate of the best row by `merit`."""
    return max(rows, key=lambda rate: merit([0, mean(rows[rate], GENEVAL), mean(rows[rate], GEDIT)]))
