"""The benchmarks' common method: turns, ratios round by round, phases, counts and files."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import common
from danceopd.core.phase import phase

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


def test_quartiles_are_numpys_and_ratios_are_taken_round_by_round():
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    assert common.quartiles(values) == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert common.quartiles([2.0]) == (2.0, 2.0, 2.0)
    # A machine twice as slow in the second round slows both: the ratio stays, where that of the medians would not be 3.
    assert common.ratios([3.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == pytest.approx((3.0, 3.0, 3.0))
    row = common.row("b", [1.0, 2.0, 4.0], samples=8, over=("a", [4.0, 4.0, 4.0]))
    assert row["milliseconds"] == pytest.approx([1500, 2000, 3000])
    assert row["samples_per_second"] == 4.0
    assert row["ratio"] == pytest.approx([1.5, 2.0, 3.0])


def test_every_variant_is_called_in_each_round_and_each_round_begins_with_another():
    called, prepared = [], []
    variants = {name: lambda name=name: called.append(name) for name in "abc"}
    times = common.interleaved(variants, rounds=3, warmup=0, prepare=prepared.append)
    assert called == prepared == list("abcbcacab")
    assert [len(times[name]) for name in "abc"] == [3, 3, 3]
    called.clear()
    times = common.interleaved({"a": lambda: called.append("a")}, rounds=2, warmup=1, least=60.0)
    assert len(called) == 2 + 2 * 50  # warmed up, then the most repeats
    assert len(times["a"]) == 2


def test_phases_inside_others_are_taken_out_of_them(monkeypatch):
    @phase("outer")
    def outer():
        clock[0] += 1.0
        with phase("inner"):
            clock[0] += 5.0
        return "done"

    clock = [0.0]
    monkeypatch.setitem(common.CLOCKS, "wall", lambda: clock[0])
    with common.Phases() as phases, phase("rest"):
        clock[0] += 0.5
        assert outer() == "done"
    outer()  # no longer timed
    assert dict(phases.seconds) == pytest.approx({"inner": 5.0, "outer": 1.0, "rest": 0.5})


def test_calls_of_functions_are_counted():
    def called():
        len([])

    def twice():
        called()
        called()

    assert common.python_calls(twice) - common.python_calls(called) == 3  # called once more, len once more, and twice


def test_counts_are_those_of_the_operations():
    a = torch.randn(32, 64)
    assert common.flops(lambda: a @ a.T) == 2 * 32 * 64 * 32
    q = torch.randn(1, 2, 16, 8)
    assert common.flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 4 * 2 * 16 * 16 * 8
    if common.device().type == "cpu":
        assert common.peak_bytes(lambda: (a + 1) + 1) == pytest.approx(2 * a.nbytes, abs=64)  # and two numbers
    limit = {"flops_per_second": {"float32": 100.0}, "copy_bytes_per_second": 10.0}
    assert common.share_of_roofline(limit, 4.0, flops=200) == 0.5
    assert common.share_of_roofline(limit, 4.0, flops=200, moved=30) == 0.75  # bound by memory
    assert common.share_of_roofline(limit, 4.0, flops=200, dtype="bfloat16") is None


def test_measuring_memory_writes_nothing_onto_the_screen():
    program = "import torch\nfrom benchmarks import common\nprint(common.peak_bytes(lambda: torch.ones(1000) + 1) > 0)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("True\n", "")


def test_a_row_is_shown_when_it_is_there(capsys):
    row = common.row("ours", [1.0, 1.0], settings={"batch": 4}, over=("plain", [2.0, 2.0]))
    assert common.show(row) is row
    (said,) = capsys.readouterr().out.splitlines()
    assert "batch 4" in said
    assert "1000 ms" in said
    assert "2.00 times as fast as plain" in said


def test_what_a_graphs_pool_keeps_counts():
    def segment(pool, size, held):
        return {"segment_pool_id": pool, "total_size": size, "allocated_size": held}

    common_pool, graph, other = (segment(p, s, h) for p, s, h in (((0, 0), 90, 20), ((0, 1), 50, 10), ((2, 0), 30, 30)))
    assert common.idle_in_pools([common_pool, graph, other]) == 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_peak_of_a_replay_is_that_of_the_call():
    """A chain of large tensors, each let go after the next: eager and replayed they take as much."""
    x = torch.randn(2**22, device="cuda")

    def chain():
        y = x
        for _ in range(6):
            y = y * 2 + 1
        return y

    eager = common.peak_bytes(chain)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        chain()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        kept = chain()
    replayed = common.peak_bytes(graph.replay) + kept.nbytes
    assert eager <= replayed < 1.5 * eager + 2**21


def test_what_a_benchmark_writes(tmp_path, capsys):
    args = common.arguments(argparse.ArgumentParser()).parse_args(
        ["--json", str(tmp_path / "new" / "a.json"), "--plot", str(tmp_path / "a.png")]
    )
    rows = [
        common.row("plain", [2.0, 2.2], settings={"batch": 4}, over=("plain", [2.0, 2.2])),
        common.row("ours", [1.0, 1.1], settings={"batch": 4}, over=("plain", [2.0, 2.2]), flops=2 * 10**9, waste=0.25),
    ]
    common.finish(common.result("trial", rows), args)
    plain, ours = capsys.readouterr().out.splitlines()[-2:]
    assert plain.index("1.00") == ours.index("2.00")  # aligned
    assert ours.endswith("0.25")
    written = json.loads((tmp_path / "new" / "a.json").read_text())
    assert written["benchmark"] == "trial"
    assert written["measured"] is True
    assert written["device"]["name"]
    assert written["rows"] == json.loads(json.dumps(rows))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        common.arguments(argparse.ArgumentParser()).parse_args(["--rounds", "0"])
