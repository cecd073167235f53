"""What a narrow base costs in score: the rows, at a few pictures."""

import pytest

from benchmarks.precision_scores import PRECISIONS, main


@pytest.mark.slow
def test_every_source_is_scored_in_every_precision(tmp_path):
    pytest.importorskip("torchao")
    rows = main(["--pictures", "2", "--json", str(tmp_path / "scores.json")])["rows"]
    assert [(row["source"], row["precision"]) for row in rows] == [(s, p) for s in ("t2i", "edit") for p in PRECISIONS]
    assert (tmp_path / "scores.json").is_file()
    for row in rows:
        assert 0 <= row["score"] <= {"t2i": 1, "edit": 10}[row["source"]]
        if row["precision"] == "bf16":
            assert row["difference"] == 0
        if row["precision"] == "int8":  # whose velocities are off by a thousandth
            assert abs(row["difference"]) <= {"t2i": 0.2, "edit": 1}[row["source"]]
