"""benchmarks/stream_bench.py at a size where it takes seconds: the bytes are those of the sources that were asked."""

import json

import pytest

pytest.importorskip("diffusers")
from benchmarks import stream_bench, train_bench


def test_sources_are_streamed_once_an_update(monkeypatch, tmp_path):
    monkeypatch.setitem(train_bench.SIZES, "small", train_bench.Size(side=32, width=16, layers=2, heads=2, rank=2))
    monkeypatch.setattr(train_bench, "ROWS", 2)
    file = tmp_path / "figures.json"
    options = ["--batch-size", "8", "--micro-batches", "1", "4", "--rounds", "1", "--json", str(file)]
    stream_bench.main(options)
    whole, parts = json.loads(file.read_text())["rows"]
    assert whole["streamed_MB"] == pytest.approx(2 * whole["one_source_MB"])  # both sources are asked
    assert parts["streamed_MB"] == whole["streamed_MB"]
    assert parts["groups"] == whole["groups"] >= 2 * 3  # two blocks and what lies outside them
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
