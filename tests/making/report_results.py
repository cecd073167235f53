"""Results, records and pictures of a run, made up."""

import json
import math

from danceopd.report.names import KINDS, TASKS
from danceopd.report.page import write_report

SCORES = {
    "base": (0.312, 1.25),
    "source_t2i": (0.880, 0.41),
    "source_edit": (0.402, 7.60),
    "weight_merge": (0.521, 2.07),
    "danceopd": (0.861, 7.48),
}


def make_row(name, overall, average):
    kinds = {kind: round(average * (0.9 + 0.03 * i), 3) for i, kind in enumerate(KINDS)}
    tasks = {task: round(min(1.0, overall * (1.08 - 0.03 * i)), 4) for i, task in enumerate(TASKS)}
    pairs = ("two_object", "colors", "position", "color_attr")
    held_t2i = {task: 0.9 * tasks[task] for task in pairs} | {
        "overall": 0.9 * overall,
        "standard_error": 0.021,
    }
    held_edit = {kind: 0.9 * value for kind, value in kinds.items()} | {"average": 0.9 * average}
    return {
        "name": name,
        "geneval": {"overall": overall, "standard_error": 0.012, "held_out": held_t2i} | tasks,
        "gedit": {"average": average, "standard_error": 0.14, "held_out": held_edit} | kinds,
    }


def make_results(**changes):
    return {
        "rows": [make_row(name, *scores) for name, scores in SCORES.items()],
        "seconds": 1234.0,
        "network_evaluations": 5_120_000,
        "machine": {"cpu": "Example CPU", "cores": 2, "memory_gib": 15.6, "torch": "2.9", "device": "cpu"},
        "config": {"seed": 0, "rollout": {"steps": 16}, "query": {"distribution": "beta", "a": 5, "b": 2}},
        "seed": 0,
        "warnings": [],
        "bars": {"t2i": 0.95, "edit": 0.95},
    } | changes


def make_records(steps=120):
    records = []
    for step in range(1, steps + 1):
        loss = 0.05 + math.exp(-step / 20) * (1 + 0.3 * math.sin(9 * step))
        records.append(
            {
                "step": step,
                "loss": loss,
                "loss_by_capability": {"t2i": 0.8 * loss, "edit": 1.2 * loss},
                "gradient_norm": 0.4,
                "learning_rate": 1e-3,
                "samples_per_second": 210.0 + step % 7,
                "network_evaluations": 4000 * step,
                "seconds": 0.5 * step,
            }
        )
        if step % 20 == 0:
            ready = 1 - math.exp(-step / 30)
            scores = {"geneval_overall": 0.87 * ready, "gedit_average": 7.5 * ready}
            records.append({"step": step, "network_evaluations": 4000 * step, "evaluation": scores})
            ratio = {str(sigma): 1 + 0.1 * sigma / step for sigma in (0.25, 0.5, 0.75)}
            health = {"velocity_norm_ratio": ratio, "state_norm_ratio": ratio}
            records.append({"step": step, "health": health})
    return records


def write_log(run_dir, records, tail=""):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "log.jsonl").write_text(lines + tail, "utf-8")


def write_page(run_dir, results=None, pictures=None):
    path = write_report(run_dir, make_results() if results is None else results, pictures or {})
    assert path == run_dir / "report.html"
    return path.read_text("utf-8").replace("\N{NO-BREAK SPACE}", " ")
