"""benchmarks.card: its parts on the CPU with torch and triton alone, and a runner that outlives what they do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from card_reports import quick_report

from benchmarks import against, common, kernel_bench
from benchmarks.card import network, parts, right, runner
from benchmarks.card.__main__ import main

ROOT = Path(__file__).parents[2]
# What is installed with torch and triton themselves.
ALONE = (
    "torch", "torchgen", "functorch", "triton", "numpy", "numpy.libs", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "filelock", "fsspec", "typing_extensions.py", "setuptools",
)  # fmt: skip


@pytest.fixture
def report(tmp_path, monkeypatch):
    return quick_report(tmp_path, monkeypatch)


# -------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("size", [network.TINY, network.Size(96, 3, 4, 2, 12, 8, 5, 16)])
def test_the_stand_ins_operations_are_counted_right(size):
    transformer = network.make(size, torch.device("cpu"), torch.float32)
    noise, conditioning = network.samples(size, 1, torch.device("cpu"))
    found = []
    counted = common.flops(
        lambda: found.append(network.velocity(transformer, noise, torch.ones(1), conditioning.prompt))
    )
    assert found[0].shape == noise.shape
    assert counted == size.flops()


def test_the_stand_in_is_of_the_size_it_says():
    with torch.device("meta"):
        transformer = network.Transformer(network.MEDIUM)
    count = sum(p.numel() for p in transformer.parameters())
    assert 2.1e9 < count < 2.6e9


def test_a_velocity_depends_on_every_input():
    size = network.TINY
    transformer = network.make(size, torch.device("cpu"), torch.float32)
    noise, conditioning = network.samples(size, 2, torch.device("cpu"))
    ask = lambda z, s, text: network.velocity(transformer, z, s, {"prompt_embeds": text})  # noqa: E731
    text, sigma = conditioning.prompt["prompt_embeds"], torch.tensor([0.9, 0.3])
    whole = ask(noise, sigma, text)
    torch.testing.assert_close(whole[1:], ask(noise[1:], sigma[1:], text[1:]), rtol=1e-4, atol=1e-5)
    for changed in ((noise + 1, sigma, text), (noise, sigma / 2, text), (noise, sigma, text + 1)):
        assert not torch.allclose(ask(*changed), whole)


def test_an_update_of_the_check_learns_and_is_the_same_by_static_steps(report):
    parts.update(report)
    static, eager, narrow, lora = (row for row in report.rows if row["unit"] == "ms")
    assert static["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    assert static["ok"]
    assert eager["ok"]
    assert narrow["ok"]
    assert lora["ok"]
    assert not list(report.out.iterdir())  # a measurement of no GPU
    assert eager["losses"] != pytest.approx(narrow["losses"], rel=1e-6)
    assert {"rollout", "query", "match", "backward", "step"} <= static["phases"].keys()
    assert sum(static["phases"].values()) == pytest.approx(100, abs=1)


def test_a_loras_step_on_a_card_is_a_file_for_the_table_against_others(report, monkeypatch):
    monkeypatch.setattr(parts, "full", lambda: True)
    monkeypatch.setattr(network, "MEDIUM", network.TINY)
    monkeypatch.setattr(common, "describe", lambda: {"name": "NVIDIA H200"})
    parts._lora_step(report)
    assert against.read_measured(report.out).keys() == {parts.LORA_STEP}


def test_rollouts_and_queries_of_the_check_are_right(report):
    parts.rollout(report)
    parts.query(report)
    assert len(report.rows) == 6 + 2
    assert all(row["ok"] for row in report.rows)
    assert all(row["least"] > 0 for row in report.rows)
    eager, static, narrow = (row["distance"] for row in report.rows[:3])
    assert eager == 0
    assert static < 1e-4 < narrow


def test_the_other_parts_of_the_check_run_on_the_cpu(report):
    parts.machine(report)
    assert "TFLOP/s" in {row["unit"] for row in report.rows}
    parts.kernels(report)
    assert sum(row["unit"] == "error" for row in report.rows) > 40
    assert all(row["ok"] for row in report.rows if row["unit"] == "error")
    cases = len(kernel_bench.cases((2, 4, 32, 32), torch.float32, "cpu"))
    assert sum("of a copy's bandwidth" in row.get("note", "") for row in report.rows) == cases


@pytest.mark.slow  # nvcc takes most of a minute
def test_the_cuda_part_of_csrc_is_built_where_nvcc_is(report):
    parts.csrc(report)
    (row,) = report.rows
    assert row["ok"] or "left out" in row["note"]


def test_a_profile_names_the_operations(report, monkeypatch):
    monkeypatch.setattr(network, "TINY", network.Size(16, 1, 2, 1, 4, 4, 2, 8))
    parts.profile(report)
    assert report.rows[0]["value"] > 50
    assert "rollout" in {row["name"] for row in report.rows}


@pytest.mark.parametrize(
    ("cuda", "reason", "said"),
    [
        (None, None, None),  # a build for the CPU, on a machine without a card
        ("13.0", "needs NVIDIA's driver 580 or later", "driver 580"),
        ("13.0", None, "finds no card"),
        (None, "is built without CUDA", "without CUDA"),
    ],
)
def test_a_card_that_torch_cannot_use_is_wrong(report, monkeypatch, cuda, reason, said):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(parts, "no_cuda", lambda: reason)
    monkeypatch.setattr(common, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(common, "roofline", lambda *_, **__: {"flops_per_second": {}, "copy_bytes_per_second": 1.0})
    parts.machine(report)
    wrong = [row["note"] for row in report.rows if row.get("ok") is False]
    assert [said in note for note in wrong] == [True] * bool(said)


class OutOfTime(Exception):
    pass


@pytest.mark.parametrize(("until", "result"), [(2, "passes"), (9, "passes"), (2, "fails")])
def test_tests_that_the_time_cut_off_are_not_right(report, tmp_path, monkeypatch, until, result):
    """Three tests, of which the time is up after so many."""
    for name in ("kernels", "training", "benchmarks", "models"):
        (tmp_path / "tests" / name).mkdir(parents=True)
    marks = "import pytest\n@pytest.mark.gpu\n@pytest.mark.parametrize('n', range(3))\n"
    body = f"{marks}def test(n): assert {result == 'passes'}\n"
    (tmp_path / "tests" / "kernels" / f"test_{result}_{until}.py").write_text(body)
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr(parts, "full", lambda: True)
    left = iter([100.0] * (until - 1) + [1.0] * 9)
    monkeypatch.setattr(report, "left", lambda: next(left), raising=False)

    def need(seconds):
        raise OutOfTime

    monkeypatch.setattr(report, "need", need)
    if until < 3:
        with pytest.raises(OutOfTime):
            parts.tests(report)
    else:
        parts.tests(report)
    row = report.rows[-1]
    assert ("2 of 3 ran, the time was up" in row["note"]) == (until < 3)
    assert row["ok"] is {("passes", 2): None, ("passes", 9): True, ("fails", 2): False}[result, until]


@pytest.mark.parametrize("wrong", [None, "routed_velocity_mse, guided", "adaln_modulate, gated"])
def test_an_operation_that_is_wrong_is_seen(wrong):
    """The host's backends against float64; one whose result is scaled by 1.001 is beyond the bound."""
    for case in right.cases(torch.device("cpu"), torch.float32, 5, 32):
        spoilt = case.run if case.name != wrong else _spoilt(case.run)
        on_host = tuple(backend for backend in case.backends if backend in ("torch", "cpu"))
        for _, error in right.errors(right.Case(case.name, on_host, case.inputs, spoilt)):
            assert (error <= right.BOUND["float32"]) == (case.name != wrong), (case.name, error)


def _spoilt(run):
    def spoilt(inputs, backend):
        found = run(inputs, backend)
        return [t * 1.001 if t.dtype == torch.float32 else t for t in found]

    return spoilt


def test_fp8_operations_are_right():
    for what, backend, error, bound in right.fp8_errors(torch.device("cpu"), torch.float32, 20, 32):
        assert error <= bound, (what, backend)


# --------------------------------------------------------------------------------------------------------- the runner


def test_the_check_runs_with_torch_and_triton_alone(tmp_path):
    """From a folder of links to what those two install: nothing else is there to import."""
    site, out = tmp_path / "site", tmp_path / "out"
    site.mkdir()
    for name in ALONE:
        there = next((Path(p) / name for p in sys.path if (Path(p) / name).exists()), None)
        if there:
            (site / name).symlink_to(there)
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-S", "-m", "benchmarks.card", "--budget", "500", "--out", str(out)]
    ran = subprocess.run(
        [*command, "--parts", "query", "tests", "zero3"], cwd=tmp_path, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr + (out / "worker.txt").read_text()
    result = json.loads((out / "card.json").read_text())
    found = {part["part"]: part for part in result["parts"]}
    assert [found[name]["ended"] for name in ("query", "tests", "zero3")] == [runner.DONE] * 3
    assert all(row["ok"] for row in found["query"]["rows"])
    assert "left out" in found["tests"]["rows"][0]["note"] or torch.cuda.is_available()
    assert "query" in (out / "card.txt").read_text()
    assert len(runner.summary(result).splitlines()) < 40


TROUBLE = """
import os, sys, time
from types import SimpleNamespace
from benchmarks.card import parts, worker

def machine(report): report.say("before", 1.0, "ms", least=0.5, ok=True); raise ValueError("no such thing")
def kernels(report): report.say("hangs", ok=True); time.sleep(600)
def update(report): report.say("dies", ok=True); os._exit(3)
def tests(report): report.need(1e9)
def query(report): report.say("after", 2.0, "ms", ok=False, note="far off", main=True)

for part in (machine, kernels, update, tests, query):
    setattr(parts, part.__name__, part)
from benchmarks.card.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow  # three processes that import torch
def test_the_runner_outlives_what_its_parts_do(tmp_path, monkeypatch, capsys):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    popen = subprocess.Popen

    def started(command, **options):
        return popen([command[0], str(tmp_path / "trouble.py"), *command[3:]], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", started)
    monkeypatch.setattr(runner, "PARTS", {"machine": 1, "kernels": 1, "update": 60, "tests": 60, "query": 60})
    monkeypatch.setattr(runner, "GRACE", 0.5)
    names = list(runner.PARTS)
    result = runner.run(names, 600, tmp_path / "out")
    ended = {part["part"]: part["ended"] for part in result["parts"]}
    assert ended == {
        "machine": runner.FAILED, "kernels": runner.STOPPED, "update": runner.ENDED, "tests": runner.STOPPED,
        "query": runner.DONE,
    }  # fmt: skip
    assert [len(part["rows"]) for part in result["parts"]] == [1, 1, 1, 0, 1]
    assert result["parts"][0]["rows"][0]["over_least"] == 2.0
    assert "no such thing" in result["parts"][0]["error"]
    assert runner.failed(result)
    said = runner.summary(result)
    assert "WRONG" in said
    assert "far off" in said
    assert json.loads((tmp_path / "out" / "card.json").read_text())["parts"] == json.loads(json.dumps(result["parts"]))
    assert "ValueError: no such thing" in (tmp_path / "out" / "card.txt").read_text()
    assert "query: done" in capsys.readouterr().out


def test_the_summary_is_one_screen():
    rows = [{"name": "a row " * 20, "value": 1.0, "unit": "ms", "ok": i > 5, "main": True} for i in range(30)]
    parts_of = [{"part": name, "ended": runner.DONE, "seconds": 9.0, "rows": rows} for name in runner.PARTS]
    said = runner.summary({"budget_seconds": 600.0, "seconds": 99.0, "parts": parts_of}).splitlines()
    assert len(said) <= 50
    assert max(map(len, said)) <= 120
    assert sum("WRONG" in line for line in said) == 3 * len(runner.PARTS)


@pytest.mark.parametrize(
    "options", [["--budget", "9"], ["--budget", "0", "--out", "x"], ["--parts", "all", "--out", "x"]]
)
def test_mistakes_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(options)
    assert refused.value.code == 2
    assert not list(tmp_path.iterdir())


def test_every_part_is_there():
    assert all(callable(getattr(parts, name)) for name in runner.PARTS)
