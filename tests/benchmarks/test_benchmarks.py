"""The benchmarks' common method, and each of them at a size where it takes a second."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import common, networks, rollout_bench, run
from danceopd.core.phase import phase


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


def test_a_suite_goes_on_past_a_failure_and_says_so(monkeypatch, tmp_path, capsys):
    result = common.result("works", [common.row("ours", [0.5])])

    def started(command, stdout, **_):
        stdout.write("what it printed\n")
        failing = command[2] == "benchmarks.fails"
        if not failing:
            (tmp_path / "works.json").write_text(json.dumps(result))
        return SimpleNamespace(returncode=3 if failing else 0)

    monkeypatch.setattr(run, "SUITE", {"fails": ("fails", [], []), "works": ("works", [], [])})
    monkeypatch.setattr(run.subprocess, "run", started)
    assert run.main(["--suite", "all", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "1 of 2 failed: fails" in printed.err
    assert "works ... done" in printed.out
    page = (tmp_path / "README.md").read_text()
    assert "Failed: exit status 3, see fails.txt" in page
    assert "500 (500 to 500)" in page
    assert (tmp_path / "fails.txt").read_text() == "what it printed\n"
    assert run.main(["--suite", "works", "--output", str(tmp_path)]) == 0
    with pytest.raises(SystemExit):
        run.main(["--suite", "unknown", "--output", str(tmp_path)])


def test_a_suite_of_one_runs_it(tmp_path):
    assert run.main(["--suite", "quick", "rollout-overhead", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "rollout-overhead.json").read_text())["rows"]
    assert len(rows) == 6
    assert (tmp_path / "rollout-overhead.png").is_file()


@pytest.mark.parametrize("model", ["world", "sd3"])
def test_rollouts_of_every_variant(model, monkeypatch, tmp_path, capsys):
    if model == "sd3":
        pytest.importorskip("diffusers")
    monkeypatch.setattr(rollout_bench, "STEPS", 4)
    monkeypatch.setattr(networks, "SD3_TEXT", 4)
    variants = ["full", "depth", "depth+static", "depth+bf16", "full+fp8"]
    options = ["--model", model, "--batch", "2", "--resolution", "32", "--guidance", "1", "3", "--rounds", "1"]
    files = [
        "--json",
        str(tmp_path / "a.json"),
        "--plot",
        str(tmp_path / "a.png"),
        "--profile",
        str(tmp_path / "traces"),
    ]
    rollout_bench.main([*options, "--variants", *variants, *files])
    result = json.loads((tmp_path / "a.json").read_text())
    assert [(row["name"], row["settings"]["guidance"]) for row in result["rows"]] == [
        (name, scale) for scale in (1.0, 3.0) for name in variants
    ]
    plain, guided = result["rows"][:5], result["rows"][5:]
    assert [row["evaluations_per_sample"] for row in plain[::4]] == [4, 4]
    assert [row["evaluations_per_sample"] for row in guided[::4]] == [8, 8]
    assert plain[1]["evaluations_per_sample"] == plain[2]["evaluations_per_sample"] < 4
    assert all(row["flops"] > 0 and row["peak_bytes"] > 0 for row in result["rows"])
    over = {kind["rollout"]: kind["over_least"] for kind in result["evaluations"]}
    assert over["K = 1, low_t"] == over["K = 4, low_t"] == over["SDE"] == 1.0
    assert over["K = 1, low_t, static steps"] < 1.03
    assert len(list((tmp_path / "traces").iterdir())) == 10
    assert "K = 4, low_t" in capsys.readouterr().out


def test_rollouts_of_unknown_variants_are_refused(capsys):
    with pytest.raises(SystemExit):
        rollout_bench.main(["--variants", "depth+fast"])
    assert "'depth+fast' is not full or depth" in capsys.readouterr().err


def test_kernels(tmp_path):
    from benchmarks import kernel_bench

    options = ["--shape", "2", "4", "32", "32", "--dtypes", "float32", "--rounds", "2", "--no-compile"]
    result = kernel_bench.main([*options, "--only", "euler", "--json", str(tmp_path / "a.json")])
    assert [(row["name"], row["settings"]["by"]) for row in result["rows"]] == [
        (name, by) for name in ("euler_step_, guided", "euler_step_") for by in ("ours", "eager")
    ]
    assert all(row["share_of_roofline"] > 0 for row in result["rows"])
    assert json.loads((tmp_path / "a.json").read_text())["latents"] == [2, 4, 32, 32]
