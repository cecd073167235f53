"""Writes the sentences of a report."""

from danceopd.report.names import EDIT_SOURCE, T2I_SOURCE, _number, duration, label, percent
from danceopd.report.tables import _GEDIT, _GENEVAL, _bars, _row, reaches_bars, shares
from danceopd.support.run_log import Log


def headline(results: dict) -> str:
    """Writes one short sentence: what the student can do of what its sources can."""
    name = label(results.get("student", "danceopd"))
    if "velocity_errors" in results:
        closed = {n: e["closed"] for n, e in results["velocity_errors"].items() if _number(e, "closed") is not None}
        if not closed:
            return f"{name} was trained; how far it is from its sources was not measured"
        parts = [f"{percent(share)} for {n}" for n, share in closed.items()]
        return f"{name} closed {_and(parts)} of the gap to its sources"
    student = _row(results, results.get("student", "danceopd"))
    if student is None:
        return "No student has been scored yet"
    own = shares(results, student)
    what = {"t2i": "drawing", "edit": "editing"}
    parts = [f"{percent(share)} of its source at {what[key]}" for key, share in own.items() if share is not None]
    return f"One model with {_and(parts)}" if parts else f"{name} has been scored"


def summary(results: dict) -> str:
    """Writes one paragraph of plain text: what the student reaches of each source, at what cost."""
    if "velocity_errors" in results:
        return _error_summary(results)
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


def _error_summary(results: dict) -> str:
    """Says how much of a model's distance to each source is gone, at what cost."""
    name, errors = label(results.get("student", "danceopd")), results["velocity_errors"]
    if not errors:
        return f"{name} was trained{_cost(results)}; its distance from the sources was not measured."
    closed = [f"{percent(e['closed'])} for {name}" for name, e in errors.items() if _number(e, "closed") is not None]
    kept = [
        f"For {name} it began as its source, and its error is now {100 * error['relative']:.2g} % of the mean square "
        "of the source’s velocity."
        for name, error in errors.items()
        if _number(error, "closed") is None
    ]
    of = "Of the distance between the untrained student’s velocity and its source’s, measured as squared error"
    parts = [f"{of}, {name} has closed {_and(closed)}{_cost(results)}."] if closed else []
    return " ".join([*parts, *kept])


def _and(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _cost(results: dict) -> str:
    """Writes " after 412 s of training and 5,120,000 network evaluations", as far as the results say."""
    seconds, evaluations = _number(results, "seconds"), _number(results, "network_evaluations")
    cost = []
    if seconds is not None:
        cost.append(f"{duration(seconds)} of training")
    if evaluations is not None:
        cost.append(f"{evaluations:,.0f} network evaluations")
    return f", after {' and '.join(cost)}" if cost else ""


def _verdict(results: dict, student: dict) -> list[str]:
    """Writes a sentence on the bars where both shares are known, and one on who else reaches them."""
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


def _warnings(results: dict, log: Log) -> list[str]:
    """Lists the results' warnings, then the log's, one line for each text with the updates that it was given at."""
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
