"""The report of the reproduction: whole, partial and empty results."""

import json
import re

import pytest
from reproductions import by_text, everything, score, source, trained, write

from danceopd.reproduce.claims import claims
from danceopd.reproduce.matrix import ABLATIONS, METHODS
from danceopd.reproduce.paper import TABLES
from danceopd.reproduce.report import build, write_report
from danceopd.reproduce.results import (
    GEDIT,
    MISSING,
    NOT,
    UNDECIDED,
    read,
    tables_of,
)


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


def test_what_contradicts_the_paper_comes_first(tmp_path):
    write(tmp_path, "ablations", [trained("danceopd", axis="default"), trained("soft", edit=9.4, axis="routing")])
    text = build(read(tmp_path)).markdown()
    assert text.index("A hard route") < text.index("Every claim")
    assert "**mean of the sources -0.40 ± 0.00**" in text


def test_no_results_at_all(tmp_path):
    assert write_report(tmp_path) == [tmp_path / "REPORT.md"]
    assert {claim.verdict for claim in claims(tables_of(read(tmp_path)))} == {MISSING}


def test_what_is_absorbed_of_an_operator_is_a_share_of_its_gap(tmp_path):
    def row(method, kind, values, **more):
        score = {"mean": sum(values) / len(values), "standard_error": 0.01, "values": values}
        return {"method": method, "kind": kind, "geneval_overall": score, "seeds": list(range(len(values))), **more}

    twice = {"evaluations": {"mean": 2.0, "standard_error": None, "values": [2.0]}}
    rows = [row("source_t2i", "source", [0.4]), row("operator_guided2", "operator", [0.6], **twice)]
    rows += [row("operator_apg", "operator", [0.5], **twice), row("guided2", "trained", [0.5, 0.55, 0.6])]
    write(tmp_path, "operators", rows)
    text = build(read(tmp_path)).markdown()
    assert "| guidance 2 | 2.00 | 0.600 ± 0.01" in text.replace("0.010", "0.01")
    assert "| 0.75 ± 0.14 |" in text
    assert "| APG, 3 | 2.00 |" in text  # not trained yet


def test_merges_have_a_table_of_each_number_and_a_figure(tmp_path):
    def row(method, loras, kept, **more):
        shares = {key: {"mean": kept, "standard_error": 0.01} for key in ("kept", "base_kept", "pairs")}
        return {"method": method, "loras": loras, "kind": "merge", "seeds": [0, 1, 2], "rank": 8, **shares, **more}

    rows = [row(name, n, kept) for n in (2, 8) for name, kept in (("danceopd", 0.97), ("by_hand", 1.0))]
    rows += [row("merge_ties", 8, 0.41, chosen=0.6)]
    write(tmp_path, "merge", rows)
    write_report(tmp_path)
    two, eight = (tmp_path / "REPORT.md").read_text().split("2 LoRAs.")[1].split("8 LoRAs.")
    assert "| DanceOPD | 0.97 ± 0.01 | 0.97 ± 0.01 | 0.97 ± 0.01 | 8 |" in two
    assert "ties" not in two
    assert "| merge, ties, 0.6 each | 0.41 ± 0.01 |" in eight
    assert (tmp_path / "plots" / "merge.png").exists()


def test_the_miniature_has_a_table_of_each_condition(tmp_path):
    both = trained("danceopd", edit=6.5)
    rows = [source("base"), source("merge_ties", chosen="0.7") | {"kind": "merge"}]
    rows += [{**both, "condition": condition} for condition in ("data", "prompts")]
    rows += [{**trained("joint", edit=6.0), "condition": "data"}]
    rows += [{**trained("joint_samples", edit=6.2), "condition": "prompts"}]
    write(tmp_path, "miniature", rows)
    write_report(tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    before, after = text.split("Prompts and pictures to edit alone")
    data, prompts = before.split("own pictures are at hand")[1], after.split("Base and sources")[0]
    assert "| DanceOPD | **6.50** ± 0.01" in data
    assert "| DanceOPD | **6.50** ± 0.01" in prompts
    assert "Joint training |" in data
    assert "Joint training |" not in prompts
    assert "| Joint training, sources' samples | 6.20 ± 0.01" in prompts
    assert "| merge, ties | 5.00 ± 0.10 | 0.850 ± 0.010 | – | 0.7 |" in text
    assert "| miniature | paper | 3 | 100 | 9 |" in text  # runs of both conditions count once
    assert (tmp_path / "plots" / "miniature_network_evaluations.png").exists()


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
