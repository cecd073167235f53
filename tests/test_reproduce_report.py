"""The report of the reproduction: verdicts on both sides of their thresholds, partial results, both pages."""

import json
import math
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from danceopd.reproduce.matrix import ABLATIONS, LEARNING_RATES, METHODS
from danceopd.reproduce.paper import TABLES
from danceopd.reproduce.report import (
    GEDIT,
    GENEVAL,
    MISSING,
    NOT,
    REPRODUCED,
    UNDECIDED,
    cheaper,
    chosen_rate,
    claims,
    difference,
    load,
    rates,
    verdict,
    write_report,
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
        "runs": [{"seconds": 50.0}],
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
    write(folder, "ablations", [*rows, trained("a_new_row", axis="beyond")])
    style = [
        source(f"source_{n}", style_share=score([v]), sketch_overall=score([0.5]))
        for n, v in (("t2i", 0.0), ("style", 0.9))
    ]
    ours = trained("danceopd", style_share=score([0.8, 0.81, 0.79]), sketch_overall=score([0.5, 0.6, 0.7]))
    write(folder, "C", [*style, ours])
    shape = {1: 0.7, 2: 0.8, 4: 0.8, 3: 0.8, 5: 0.7, 7: 0.6}
    scores = [(a, {f"beta{b}": score([shape.get(a * b, 0.1)]) for b in (1, 2, 3)}) for a in (1, 2, 3)]
    base = source("base", **{f"beta{n}": score([shape.get(n, 0.1)]) for n in (1, 2, 3, 4, 6, 9)})
    write(folder, "D", [base, *(trained(f"alpha{a}", **s) for a, s in scores)])
    write(folder, "E", [source("base"), trained("danceopd", local_average=score([9.0]))])
    write(folder, "F", [source("before"), trained("danceopd"), trained("without_self")])
    write(folder, "grid", [trained(f"{m}@{r:g}", t2i=0.8 + r, seeds=(0,)) for m in METHODS for r in (0.0003, 0.001)])


def by_text(tables):
    return {claim.text: claim for claim in claims(tables)}


class Page(HTMLParser):
    """Collects what a page opens, closes and points to."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in ("meta", "path", "br", "use", "rect", "image", "link", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_whole_report(tmp_path):
    everything(tmp_path)
    written = write_report(tmp_path)
    assert all(path.exists() for path in written)
    text = (tmp_path / "REPORT.md").read_text()
    for plot in re.findall(r"\]\((plots/.*?)\)", text):
        assert tmp_path / plot in written
    assert {p.stem for p in written} >= {
        "A_evaluations",
        "A_seconds",
        "ablation_query",
        "ablation_objective",
        "guidance",
    }
    assert "A new row" in text
    assert "9.50 ± 0.01" in text
    assert "5.347" in text
    line = next(x for x in text.splitlines() if x.startswith("| DanceOPD |") and "5.347" in x)
    assert "9.50" in line
    assert "abc" in line
    assert "**8.99 / 0.791**" in text  # the best rate of a method
    page = Page()
    html = (tmp_path / "report.html").read_text()
    page.feed(html)
    assert not page.open
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags
    assert "a &lt;fast&gt; one" in html
    assert "<fast>" not in html


def test_claims_of_a_complete_result(tmp_path):
    everything(tmp_path)
    found = by_text(load(tmp_path))
    assert found["A: DanceOPD has the best edit average"].verdict == REPRODUCED
    assert found["A: DanceOPD has the best GenEval overall"].verdict == UNDECIDED  # all alike
    assert found["A: DanceOPD keeps at least 0.98 of the T2I source's overall"].verdict == NOT  # 0.8 of 0.85
    assert found["One query beats four and sixteen"].verdict == REPRODUCED
    style = found["C: the student closes 85.3 % of its gap to the style source"]
    assert style.verdict == REPRODUCED
    assert "88.9 %" in style.figures
    guidance = found["D: absorbed and inference guidance multiply"]
    assert guidance.verdict == REPRODUCED
    assert "0.000 apart" in guidance.figures
    assert not any(claim.verdict == MISSING for claim in found.values())


def test_what_contradicts_the_paper_comes_first(tmp_path):
    everything(tmp_path)
    write(tmp_path, "ablations", [trained("danceopd", axis="default"), trained("soft", edit=9.4, axis="routing")])
    write_report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert text.index("A hard route") < text.index("Every claim")
    assert "mean of the sources -0.40" in text


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
    ours, theirs = trained("a", edit=9.1), trained("b", edit=9.0)
    value, error = difference(ours, theirs, GEDIT)
    assert value == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-9)
    value, error = difference(ours, trained("b", edit=9.0, seeds=(0, 1)), GEDIT)
    expected = math.sqrt(statistics.variance(NOISE) / 3 + statistics.variance(NOISE[:2]) / 2)
    assert error == pytest.approx(expected)
    value, error = difference(ours, 9.0, GEDIT)
    assert value == pytest.approx(0.1)
    assert error == pytest.approx(statistics.stdev(NOISE) / math.sqrt(3))
    assert difference(ours, source("c"), GEDIT)[0] == pytest.approx(4.1)
    assert difference(ours, None, GEDIT) is None
    assert difference(ours, {"seeds": []}, GEDIT) is None


def test_how_much_cheaper():
    ours = {"curve": [[0, 0.7, 8.0], [100, 0.9, 8.0], [200, 0.95, 8.0]]}
    theirs = {"curve": [[0, 0.7, 8.0], [400, 0.8, 8.0]]}
    assert cheaper(ours, theirs) == pytest.approx(50 / 400)
    assert cheaper(theirs, ours) == math.inf
    assert cheaper(ours, {}) is None
    assert cheaper(None, theirs) is None
    assert cheaper(ours, {"curve": [[0, 0.7, 8.0], [400, 0.6, 8.0]]}) == 0.0


def test_partial_results_and_none(tmp_path):
    write_report(tmp_path)
    assert "not run yet" in (tmp_path / "REPORT.md").read_text()
    write(tmp_path, "A", [trained("danceopd", seeds=(0,)), trained("joint", seeds=(0,), curve=())])
    rows = load(tmp_path)["A"]
    del rows["joint"]["curve"]
    write(tmp_path, "A", list(rows.values()))
    write(tmp_path, "D", [source("base"), trained("alpha2", beta2=score([0.5]))])
    write_report(tmp_path)
    found = by_text(load(tmp_path))
    assert found["A: DanceOPD has the best edit average"].verdict == UNDECIDED  # one seed
    assert found["B: DanceOPD has the best edit average"].verdict == MISSING


def test_the_published_figures_belong_to_rows_that_exist():
    assert TABLES["A"].keys() - METHODS.keys() == {"source_t2i", "source_edit", "weight_merge"}
    assert TABLES["ablations"].keys() <= {row for axis in ABLATIONS.values() for row in axis}


def test_the_chosen_rate_is_the_largest_of_the_nearly_best():
    rows = {rate: trained("a", t2i=t, seeds=(0,)) for rate, t in ((1e-4, 0.8), (3e-4, 0.83), (1e-3, 0.82), (3e-3, 0.7))}
    assert chosen_rate(rows) == 1e-3
    rows[1e-3] = trained("a", t2i=0.8, seeds=(0,))
    assert chosen_rate(rows) == 3e-4


def test_the_matrix_uses_the_rates_that_the_grid_chose():
    grid = load(Path(__file__).parents[1] / "results")["grid"]
    assert {method: chosen_rate(rows) for method, rows in rates(grid).items()} == LEARNING_RATES
