"""benchmarks/train_bench.py at a size where it takes seconds: all of its contenders learn the same."""

import json

import pytest

pytest.importorskip("diffusers")
from benchmarks import train_bench as bench

PHASES = {"route, data", "rollout", "query", "student", "step", "rest"}


def test_every_contender_has_the_same_loss(monkeypatch, tmp_path, capsys):
    small = {"SIDE": 32, "WIDTH": 16, "LAYERS": 2, "HEADS": 2, "RANK": 2, "ROWS": 2, "STEPS": 4, "RATE": 1e-2}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setitem(bench.FAST, "num_inference_steps", 2)
    file = tmp_path / "figures.json"
    rows = bench.main(["--rounds", "2", "--batch-size", "4", "--json", str(file)])["rows"]
    plain, ours, fast, *without = rows
    assert [row["name"] for row in rows[:3]] == ["plain loop", "ours", "ours, fast"]
    assert len(without) == 5
    assert [row["loss"] for row in (ours, *without)] == pytest.approx([plain["loss"]] * 6, rel=1e-4)
    assert fast["loss"] != pytest.approx(plain["loss"], rel=1e-3)  # other states
    assert all(row["phases"].keys() == PHASES for row in (ours, fast, *without))
    assert plain["phases"].keys() == PHASES | {"encoding"}
    assert json.loads(file.read_text())["rows"][0]["name"] == "plain loop"
    assert "plain loop" in capsys.readouterr().out


def test_the_picture_world_learns_the_same(tmp_path):
    plain, ours, _ = bench.main(["--world", "--rounds", "1", "--batch-size", "4"])["rows"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
