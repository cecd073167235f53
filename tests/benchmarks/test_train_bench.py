"""benchmarks/train_bench.py at a size where it takes seconds: all of its contenders learn the same."""

import json

import pytest

pytest.importorskip("diffusers")
from benchmarks import train_bench as bench

PHASES = {"route", "rollout", "query", "match", "backward", "step", "rest"}


def test_every_contender_has_the_same_loss(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.SIZES, "small", bench.Size(side=32, width=16, layers=2, heads=2, rank=2))
    for name, value in {"ROWS": 2, "STEPS": 4, "RATE": 1e-2}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setitem(bench.FAST, "num_inference_steps", 2)
    file = tmp_path / "figures.json"
    options = ["--rounds", "2", "--batch-size", "4", "--micro-batch", "4", "1", "--clock", "cpu"]
    rows = {row["name"]: row for row in bench.main([*options, "--json", str(file)])["rows"]}
    plain, ours = rows["plain loop"], [row for name, row in rows.items() if "fast" not in name]
    fast = [rows["ours, fast"], rows["ours, fast, 1 at a time"]]
    assert len(ours) == 1 + 2 + 5
    assert [row["loss"] for row in ours] == pytest.approx([plain["loss"]] * 8, rel=1e-4)
    assert fast[0]["loss"] == pytest.approx(fast[1]["loss"], rel=1e-4)
    assert fast[0]["loss"] != pytest.approx(plain["loss"], rel=1e-3)  # other states
    for name, row in rows.items():
        assert row["phases"].keys() == PHASES | ({"encode"} if name == "plain loop" else set())
        assert sum(row["phases"].values()) == pytest.approx(100)
        assert row["python_calls"] > 1000
    assert rows["ours"]["python_calls"] < rows["ours, 1 at a time"]["python_calls"]
    assert json.loads(file.read_text())["rows"][0]["name"] == "plain loop"
    assert "times are of the processor" in capsys.readouterr().out


def test_the_picture_world_learns_the_same(tmp_path):
    rows = bench.main(["--world", "--rounds", "1", "--batch-size", "4"])["rows"]
    plain, ours = (next(row for row in rows if row["name"] == name) for name in ("plain loop", "ours"))
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
