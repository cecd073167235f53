"""The report of the reproduction: verdicts on both sides of their thresholds, partial results, both pages."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from danceopd.reproduce.claims import claims, onset
from danceopd.reproduce.matrix import ABLATIONS, INFERENCE_SCALES, LEARNING_RATES, METHODS, TRAINING_SCALES
from danceopd.reproduce.measure import products
from danceopd.reproduce.paper import TABLES
from danceopd.reproduce.report import build, write_report
from danceopd.reproduce.results import (
    GEDIT,
    GENEVAL,
    MISSING,
    NOT,
    REPRODUCED,
    UNDECIDED,
    by_seed,
    cheaper,
    chosen_rate,
    difference,
    rates,
    read,
    tables_of,
    verdict,
)

NOISE = (-0.01, 0.0, 0.01)
STYLE = "C: the student closes 85.3 % of its gap to the style source"
MULTIPLY = "D: absorbed and inference guidance multiply: nearer to the source at alpha x beta than at beta alone"


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


def test_the_whole_report(tmp_path):
    everything(tmp_path)
    written = write_report(tmp_path)
    assert all(path.exists() for path in written)
    text = (tmp_path / "REPORT.md").read_text()
    for plot in re.findall(r"\]\((plots/.*?)\)", text):
        assert tmp_path / plot in written
    assert {p.stem for p in written} >= {
        "A_network_evaluations",
        "A_seconds",
        "ablation_query",
        "ablation_objective",
        "guidance",
    }
    assert "A new row" in text
    assert "A row without an axis" in text
    assert "**9.50** ± 0.01" in text  # the best
    assert "**5.347**" in text
    assert "5.347" in text
    line = next(x for x in text.splitlines() if x.startswith("| DanceOPD |") and "5.347" in x)
    assert "9.50" in line
    assert "abc" in line
    assert "**8.99 / 0.791**" in text  # the best rate of a method


def test_claims_of_a_complete_result(tmp_path):
    everything(tmp_path)
    found = by_text(tables_of(read(tmp_path)))
    assert found["A: DanceOPD has the best edit average"].verdict == REPRODUCED
    assert found["A: DanceOPD has the best GenEval overall"].verdict == UNDECIDED  # all alike
    assert found["A: DanceOPD keeps at least 0.98 of the T2I source's overall"].verdict == NOT  # 0.8 of 0.85
    assert found["One query beats four and sixteen"].verdict == REPRODUCED
    style = found[STYLE]
    assert style.verdict == REPRODUCED
    assert "88.9 ± 0.6 %" in style.figures
    assert found[MULTIPLY].verdict == REPRODUCED
    assert "0.010 at alpha x beta" in found[MULTIPLY].figures
    over = found["D: a product of 49 falls below the best composition"]
    assert over.verdict == REPRODUCED
    assert "below the unguided 0.700 from 6 for students, from 6 for the source itself" in over.figures
    assert not any(claim.verdict == MISSING for claim in found.values())


def test_what_contradicts_the_paper_comes_first(tmp_path):
    write(tmp_path, "ablations", [trained("danceopd", axis="default"), trained("soft", edit=9.4, axis="routing")])
    text = build(read(tmp_path)).markdown()
    assert text.index("A hard route") < text.index("Every claim")
    assert "**mean of the sources -0.40 ± 0.00**" in text


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        ((0.1, 0.04), REPRODUCED),
        ((-0.1, 0.04), NOT),
        ((0.1, 0.06), UNDECIDED),
        ((0.1, None), UNDECIDED),
        (None, MISSING),
    ],
)
def test_verdicts(gap, expected):
    assert verdict(gap) == expected


def test_differences_are_taken_seed_by_seed():
    ours, theirs = by_seed(trained("a", edit=9.1), GEDIT), by_seed(trained("b", edit=9.0), GEDIT)
    value, error = difference(ours, dict(reversed(theirs.items())))
    assert value == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-9)
    value, error = difference(ours, by_seed(trained("b", edit=9.0, seeds=(0, 1)), GEDIT))
    expected = math.sqrt(statistics.variance(NOISE) / 3 + statistics.variance(NOISE[:2]) / 2)
    assert error == pytest.approx(expected)
    value, error = difference(ours, by_seed(source("c", edit=9.0), GEDIT))
    assert value == pytest.approx(0.1)
    assert error == pytest.approx(statistics.stdev(NOISE) / math.sqrt(3))
    assert difference(ours, {None: 10.0}, share=0.9)[0] == pytest.approx(0.1)
    assert difference({0: 1.0}, {0: 0.5}) == (0.5, None)
    assert difference(ours, by_seed(None, GEDIT)) is None
    assert difference(by_seed({"seeds": []}, GEDIT), theirs) is None


def test_how_much_cheaper():
    ours = [[0, 0.7, 8.0], [100, 0.9, 8.0], [200, 0.95, 8.0]]
    theirs = [[0, 0.7, 8.0], [400, 0.8, 8.0]]
    assert cheaper(ours, theirs) == pytest.approx(50 / 400)
    assert cheaper(theirs, ours) == math.inf
    assert cheaper(ours, [[0, 0.7, 8.0], [400, 0.6, 8.0]]) == 0.0
    assert cheaper(ours, [[0, 0.8, 8.0], [400, 0.6, 8.0]]) == math.inf


def runs(*best):
    """Runs whose curves rise in a straight line to a GenEval overall of `best`, a seed each."""
    return [{"seed": s, "seconds": 1.0, "curve": [[0, 0.5, 8.0], [100, b, 8.0]]} for s, b in enumerate(best)]


@pytest.mark.parametrize(
    ("ours", "expected", "words"),
    [
        ((0.9, 0.91, 0.92), REPRODUCED, "times fewer"),
        ((0.7, 0.7, 0.95), UNDECIDED, "reached in 1 of 3"),
        ((0.7, 0.71, 0.72), NOT, "reached in 0 of 3"),
        ((0.8, 0.81, 0.9), UNDECIDED, "of its evaluations"),
        ((0.9,), UNDECIDED, "times fewer"),
    ],
)
def test_fewer_evaluations_are_decided_over_seeds(ours, expected, words):
    rows = {"danceopd": trained("danceopd", runs=runs(*ours)), "flow_opd": trained("f", runs=runs(0.8, 0.8, 0.8))}
    claim = by_text({"A": rows})["A: DanceOPD reaches the best of Flow-OPD in fewer network evaluations"]
    assert claim.verdict == expected
    assert words in claim.figures


@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        ((0.9, 0.91, 0.89), REPRODUCED),
        ((0.851, 0.853, 0.852), REPRODUCED),
        ((0.828, 0.83, 0.829), NOT),
        ((0.8, 0.81, 0.79), NOT),
        ((0.8, 0.85, 0.9), UNDECIDED),
        ((0.99,), UNDECIDED),
    ],
)
def test_the_share_of_the_gap_is_decided_over_seeds(closed, expected):
    rows = {name: source(name, style_share=score([v])) for name, v in (("source_t2i", 0.0), ("source_style", 1.0))}
    rows["danceopd"] = trained("danceopd", seeds=range(len(closed)), style_share=score(closed))
    assert by_text({"C": rows})[STYLE].verdict == expected


@pytest.mark.parametrize(("steps16", "expected"), [(8.7, REPRODUCED), (8.55, UNDECIDED), (8.4, NOT)])
def test_the_band_of_rollout_steps(steps16, expected):
    rows = {name: trained(name) for name in ("danceopd", "steps20", "steps28")}
    rows["steps16"] = trained("steps16", edit=steps16)
    assert (
        by_text({"ablations": rows})[
            "16 rollout steps keep at least 0.95 of the edit average of 8 (the default here), 20 and 28"
        ].verdict
        == expected
    )


def test_guidance_that_was_not_absorbed_does_not_multiply():
    own = {beta: 0.9 - 0.1 * beta for beta in (1, 2, 4)}
    rows = {"source_t2i": source("source_t2i", **{f"beta{b}": score([v]) for b, v in own.items()})}
    for absorbed, expected in ((2, REPRODUCED), (1, NOT)):
        scores = {f"beta{b}": score([own[absorbed * b] + x for x in (0.0, 0.01, 0.02)]) for b in (1, 2)}
        rows["alpha2"] = trained("alpha2", **scores)
        assert by_text({"D": rows})[MULTIPLY].verdict == expected


def test_where_too_much_guidance_sets_in():
    assert onset({1: 0.7, 2: 0.8, 4: 0.6, 6: 0.7, 9: 0.5, 49: 0.1}, 0.7) == 9
    assert onset({1: 0.7, 2: 0.8}, 0.7) is None


def test_no_results_at_all(tmp_path):
    assert write_report(tmp_path) == [tmp_path / "REPORT.md"]
    assert {claim.verdict for claim in claims(tables_of(read(tmp_path)))} == {MISSING}


def test_partial_results(tmp_path):
    write(tmp_path, "A", [trained("danceopd", edit=9.5), trained("joint", seeds=(0, 1))])
    write(tmp_path, "D", [source("base"), trained("alpha2", seeds=(0,), beta2=score([0.5]))])
    write_report(tmp_path)
    found = by_text(tables_of(read(tmp_path)))
    assert found["A: DanceOPD has the best edit average"].verdict == MISSING  # the others have not run
    assert "Joint training +0.50" in found["A: DanceOPD has the best edit average"].figures
    assert found["B: DanceOPD has the best edit average"].verdict == MISSING
    assert "| Flow-OPD | 4.854 | 0.814 | – | – |" in (tmp_path / "REPORT.md").read_text()
    write(tmp_path, "A", [trained("danceopd"), trained("joint", edit=9.5)])
    assert by_text(tables_of(read(tmp_path)))["A: DanceOPD has the best edit average"].verdict == NOT  # one is enough


def test_scores_of_nothing(tmp_path):
    everything(tmp_path)
    for path in tmp_path.glob("*.json"):
        file = json.loads(path.read_text())
        for row in file["rows"]:
            for value in row.values():
                if isinstance(value, dict) and "values" in value:
                    value |= {"mean": 0.0, "standard_error": 0.0, "values": [0.0] * len(value["values"])}
            row |= {"curve": [[x, 0.0, 0.0] for x, *_ in row["curve"]]} if "curve" in row else {}
        path.write_text(json.dumps(file))
    assert build(read(tmp_path)).markdown()
    assert {claim.verdict for claim in claims(tables_of(read(tmp_path)))} <= {UNDECIDED, MISSING}


def test_one_seed_decides_nothing(tmp_path):
    everything(tmp_path)
    for path in tmp_path.glob("*.json"):
        file = json.loads(path.read_text())
        for row in file["rows"]:
            row["seeds"] = row["seeds"][:1]
            for value in row.values():
                if isinstance(value, dict) and "values" in value:
                    value |= {"values": value["values"][:1], "standard_error": None}
        path.write_text(json.dumps(file))
    assert build(read(tmp_path)).markdown()
    assert {claim.verdict for claim in claims(tables_of(read(tmp_path)))} == {UNDECIDED}


@pytest.mark.parametrize(
    "key", ["commit", "updates", "seconds", "network_evaluations", "seeds", "curve", "runs", "axis", GEDIT]
)
def test_a_missing_key_is_left_out(tmp_path, key):
    for setting in ("A", "C", "ablations"):
        rows = [trained("danceopd", axis="default"), trained("soft", axis="routing"), source("source_t2i")]
        write(tmp_path, setting, [{k: v for k, v in row.items() if k != key} for row in rows])
    assert "mean of the sources" in build(read(tmp_path)).markdown()


def test_the_published_figures_belong_to_rows_that_exist():
    assert TABLES["A"].keys() - METHODS.keys() == {"source_t2i", "source_edit", "weight_merge"}
    assert TABLES["ablations"].keys() <= {row for axis in ABLATIONS.values() for row in axis}


def test_the_chosen_rate_is_the_best():
    rows = {rate: trained("a", t2i=t, seeds=(0,)) for rate, t in ((1e-4, 0.8), (3e-4, 0.83), (1e-3, 0.82))}
    assert chosen_rate(rows) == 3e-4
    rows[1e-3] = trained("a", t2i=0.8, edit=9.4, seeds=(0,))
    assert chosen_rate(rows) == 1e-3


def test_the_matrix_uses_the_rates_that_the_grid_chose():
    grid = tables_of(read(Path(__file__).parents[2] / "results"))["grid"]
    assert {method: chosen_rate(rows) for method, rows in rates(grid).items()} == LEARNING_RATES
