"""benchmarks/train_bench.py at a size where it takes seconds: all of its contenders learn the same."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")


def test_every_contender_has_the_same_loss(monkeypatch, tmp_path, capsys):
    path = Path(__file__).parents[1] / "benchmarks" / "train_bench.py"
    spec = importlib.util.spec_from_file_location("train_bench", path)
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "train_bench", bench)
    spec.loader.exec_module(bench)
    small = {"SIDE": 32, "WIDTH": 16, "LAYERS": 2, "HEADS": 2, "RANK": 2, "ROWS": 2, "STEPS": 4, "RATE": 1e-2}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    results = bench.main(["--rounds", "2", "--batch-size", "4", "--json", str(tmp_path / "figures.json")])
    assert [m.name for m in results[:2]] == ["ours", "plain loop"]
    assert len(results) == 7
    assert [m.loss for m in results[1:]] == pytest.approx([results[0].loss] * 6, rel=1e-4)
    assert all(m.ratio[1] <= m.ratio[0] <= m.ratio[2] for m in results)
    assert json.loads((tmp_path / "figures.json").read_text())["rows"][1]["name"] == "plain loop"
    assert "plain loop" in capsys.readouterr().out
