"""Results of a reproduction, made up."""

import json
import math
import statistics

from danceopd.reproduce.claims import claims
from danceopd.reproduce.matrix import ABLATIONS, INFERENCE_SCALES, METHODS, TRAINING_SCALES
from danceopd.reproduce.measure import products
from danceopd.reproduce.results import (
    GEDIT,
    GENEVAL,
)

NOISE = (-0.01, 0.0, 0.01)


def score(values):
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "values": list(values)}


def trained(method, edit=9.0, t2i=0.8, seeds=(0, 1, 2), curve=((0, 0.7, 8.5), (100, 0.8, 9.0)), **more):
    return {
        "method": method,
        "kind": "trained",
        "seeds": list(seeds),
        GENEVAL: score([t2i + NOISE[s] for s in seeds]),
        GEDIT: score([edit + NOISE[s] for s in seeds]),
        "network_evaluations": 100,
        "updates": 10,
        "seconds": 50.0,
        "commit": "abc",
        "curve": [list(point) for point in curve],
        "runs": [{"seed": seed, "seconds": 50.0} for seed in seeds],
        **more,
    }


def source(method, edit=5.0, t2i=0.85, **more):
    return {
        "method": method,
        "kind": "source",
        "seeds": [],
        GENEVAL: {"mean": t2i, "standard_error": 0.01, "values": [t2i]},
        GEDIT: {"mean": edit, "standard_error": 0.1, "values": [edit]},
        "network_evaluations": 0,
        "seconds": 0,
        "commit": "abc",
        **more,
    }


def write(folder, setting, rows):
    folder.mkdir(exist_ok=True)
    table = {
        "setting": setting,
        "budget": {"name": "paper", "network_evaluations": 100, "seeds": 3},
        "machine": {"cpu": "a <fast> one", "cores": 2},
        "rows": rows,
    }
    (folder / f"{setting}.json").write_text(json.dumps(table))


def everything(folder):
    for setting, sources in (("A", ("t2i", "edit")), ("B", ("t2i", "local", "global"))):
        rows = [source(f"source_{name}") for name in sources]
        rows.append(source("weight_merge", t2i=0.5, chosen="merge_uniform") | {"kind": "merge"})
        rows += [trained(name, edit=9.5 if name == "danceopd" else 9.0) for name in METHODS]
        write(folder, setting, rows)
    rows = [
        trained(row, edit=9.2 if row == "danceopd" else 9.0, axis=axis)
        for axis, members in ABLATIONS.items()
        for row in members
    ]
    write(folder, "ablations", [*rows, trained("a_new_row", axis="beyond"), trained("a_row_without_an_axis")])
    style = [
        source(f"source_{n}", style_share=score([v]), sketch_overall=score([0.5]))
        for n, v in (("t2i", 0.0), ("style", 0.9))
    ]
    ours = trained("danceopd", style_share=score([0.8, 0.81, 0.79]), sketch_overall=score([0.5, 0.6, 0.7]))
    write(folder, "C", [*style, ours])
    shape = {1: 0.7, 2: 0.8, 3: 0.75, 4: 0.8, 5: 0.7}
    base = source("base", **{f"beta{n}": score([shape.get(n, 0.1)]) for n in products()})
    students = [
        trained(
            f"alpha{a}",
            **{f"beta{b}": score([shape.get(a * b, 0.1) + x for x in (0.0, 0.01, 0.02)]) for b in INFERENCE_SCALES},
        )
        for a in TRAINING_SCALES
    ]
    write(folder, "D", [base, *students])
    write(folder, "E", [source("base"), trained("danceopd", local_average=score([9.0]))])
    write(folder, "F", [source("before"), trained("danceopd"), trained("without_self")])
    write(folder, "grid", [trained(f"{m}@{r:g}", t2i=0.8 + r, seeds=(0,)) for m in METHODS for r in (0.0003, 0.001)])


def by_text(tables):
    return {claim.text: claim for claim in claims(tables)}


def runs(*best):
    """Runs whose curves rise in a straight line to a GenEval overall of `best`, a seed each."""
    return [{"seed": s, "seconds": 1.0, "curve": [[0, 0.5, 8.0], [100, b, 8.0]]} for s, b in enumerate(best)]
