"""Runs of several ranks, as real processes on the CPU: equal to one process, resumed anywhere, hurt in many ways."""

import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from world_runs import two_sources, write_networks
from zero_fork import as_rank

from danceopd.training import checkpoints as state

# Importing it takes seconds, which only the ranks need.
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[3]
MAKING = ROOT / "tests" / "making"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(MAKING)]),
}
STEPS = 20


@pytest.fixture(scope="module")
def context():
    """Makes processes from one that has imported everything already."""
    kept = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["zero_ranks", "zero_fork"])
    yield found
    for name, value in kept.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small run with two sources, as plain values."""
    folder = tmp_path_factory.mktemp("networks")
    write_networks(folder)
    return {
        **two_sources(folder, 50),
        "rollout": {"num_inference_steps": 4},
        "training": {
            "max_steps": STEPS,
            "batch_size": 8,
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "save_every": 5,
            "sample_every": 0,
            "log_every": 1,
        },
        "evaluation": {"times": 0, "quick": 1, "num_inference_steps": 4},
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """Ranks at work on a configuration, in folder / "run"; size 0: one process without DeepSpeed."""

    def __init__(self, context, folder, raw, size, stage=3, fault=None, settings=None, arguments=()):
        self.folder, self.size = folder, max(1, size)
        self.logs = folder / f"logs-{len(list(folder.glob('logs-*')))}"
        self.logs.mkdir(parents=True)
        config, deepspeed = self.logs / "config.yaml", self.logs / "deepspeed.json"
        config.write_text(yaml.safe_dump(raw))
        deepspeed.write_text(json.dumps(settings or {"zero_optimization": {"stage": stage}}))
        given = ["--config", str(config), *arguments, f"training.output_dir={folder / 'run'}"]
        if size:
            given += ["--deepspeed", str(deepspeed)]
        port = free_port()
        self.processes = [
            context.Process(target=as_rank, args=(rank, size, port, self.logs, given, fault or {}))
            for rank in range(self.size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds=120):
        """The exit statuses, within so many seconds; all are ended then."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in late:
            self.processes[rank].kill()
            self.processes[rank].join()
        assert not late, f"ranks {late} did not end in {seconds} s: {self.said()}"
        return [process.exitcode for process in self.processes]

    def done(self, seconds=120):
        """Wait for a run that ends well. Returns the run's folder."""
        statuses = self.wait(seconds)
        assert statuses == [0] * self.size, self.said()
        return self.folder / "run"

    def said(self):
        """All that the ranks printed."""
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.logs.glob("[eo]*-*")))

    def err(self, rank=0):
        return (self.logs / f"err-{rank}").read_text()

    def out(self, rank=0):
        return (self.logs / f"out-{rank}").read_text()


def losses(folder):
    """{step: loss} of a run's log, in which no step stands twice."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = [(r["step"], r["loss"]) for r in records if "loss" in r]
    assert len(dict(found)) == len(found)
    return dict(found)


def newest(folder):
    """The path of the newest checkpoint and its tensors, whole."""
    checkpoint, _ = state.load_newest(folder / "checkpoints")
    return checkpoint.path, {name: checkpoint.tensor(name) for name in checkpoint.shapes}


def assert_same_weights(folder, other):
    (path, ours), (other_path, theirs) = newest(folder), newest(other)
    assert path.name == other_path.name
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def with_training(raw, method="danceopd", **training):
    rollout = {} if method == "joint" else raw["rollout"]  # it reads no steps
    return {**raw, "method": method, "rollout": rollout, "training": {**raw["training"], **training}}


@pytest.fixture(scope="module")
def alone(context, base, tmp_path_factory):
    """The losses of the single process, by method."""
    found = {}
    for method in ("danceopd", "joint"):
        run = Run(context, tmp_path_factory.mktemp(f"alone-{method}"), with_training(base, method), 0)
        found[method] = losses(run.done())
    return found


@pytest.fixture(scope="module")
def whole(context, base, tmp_path_factory):
    """The folder of an uninterrupted run on two ranks at stage 3, that looked at its replica after each update."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(context, folder, base, 2, fault={"what": "watch_replica", "report": str(folder)})
    run.done()
    return run


def test_two_ranks_have_the_losses_of_one_process(alone, whole):
    found = losses(whole.folder / "run")
    assert len(found) == STEPS
    assert found == pytest.approx(alone["danceopd"], rel=1e-5)


def test_joint_in_parts_has_the_losses_of_one_process(context, base, alone, tmp_path):
    run = Run(context, tmp_path, with_training(base, "joint", gradient_accumulation_steps=2, max_steps=8), 2)
    assert losses(run.done()) == pytest.approx({step: alone["joint"][step] for step in range(1, 9)}, rel=1e-5)


def replica_reports(folder):
    """What the ranks found to differ, by update."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("replica-*.json"))]
    assert len(reports) == 2
    return reports


def test_the_replica_is_the_student_after_every_update(whole):
    for report in replica_reports(whole.folder):
        assert report == [[]] * STEPS


def test_the_replica_of_bf16_is_what_autocast_computes_with(context, base, alone, tmp_path):
    fault = {"what": "watch_replica", "report": str(tmp_path)}
    run = Run(context, tmp_path, with_training(base, precision="bf16", max_steps=6), 2, fault=fault)
    found = losses(run.done())
    for report in replica_reports(tmp_path):
        assert report == [[]] * 6
    assert found == pytest.approx({step: alone["danceopd"][step] for step in found}, rel=0.05)
    assert found != pytest.approx({step: alone["danceopd"][step] for step in found}, rel=1e-5)


def test_the_replica_in_fp8_is_the_rounded_student_after_every_update(context, base, alone, tmp_path):
    """Two ranks at stage 3, and what they do is what one process does with such a replica."""
    raw = with_training(base, rollout_precision="fp8", max_steps=4, save_every=2)
    run = Run(context, tmp_path / "two", raw, 2, fault={"what": "watch_replica", "report": str(tmp_path)})
    one = Run(context, tmp_path / "one", raw, 0)
    found = losses(run.done())
    for report in replica_reports(tmp_path):
        assert report == [[]] * 4
    assert "rollouts run on a replica in fp8" in run.out()
    assert found == pytest.approx(losses(one.done()), rel=1e-5)
    own = {step: alone["danceopd"][step] for step in found}
    assert found == pytest.approx(own, rel=0.05)


def interrupted(whole, folder, step=15):
    """A copy of the uninterrupted run as it was at a step."""
    shutil.copytree(whole.folder / "run", folder / "run")
    for path in state.checkpoints(folder / "run" / "checkpoints"):
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)
    return folder


def test_any_ranks_go_on_from_any_others(context, base, whole, tmp_path):
    interrupted(whole, tmp_path)
    for step, (size, stage) in enumerate([(0, 0), (3, 3), (2, 2), (1, 0), (2, 3)], start=16):
        run = Run(context, tmp_path, base, size, stage, arguments=[f"training.max_steps={step}"])
        run.done()
        assert f"going on from step {step - 1}" in run.out()
        checkpoint, _ = state.load_newest(tmp_path / "run" / "checkpoints")
        assert (checkpoint.step, checkpoint.ranks) == (step, max(1, size))
    assert losses(tmp_path / "run") == pytest.approx(losses(whole.folder / "run"), rel=1e-5)


def test_a_flipped_byte_in_one_file_sends_all_ranks_back(context, base, whole, tmp_path):
    shutil.copytree(whole.folder / "run", tmp_path / "run")
    damaged = newest(tmp_path / "run")[0]
    data = bytearray((damaged / "rank-00001-of-00002.safetensors").read_bytes())
    data[-9] ^= 1
    (damaged / "rank-00001-of-00002.safetensors").write_bytes(data)
    run = Run(context, tmp_path, base, 2)
    run.done()
    assert f"{damaged} is damaged (rank-00001-of-00002.safetensors has not the bytes" in run.out()
    assert "going on from step 15" in run.out()
    assert_same_weights(tmp_path / "run", whole.folder / "run")
    assert losses(tmp_path / "run") == losses(whole.folder / "run")


KILLS = {
    "in a rollout": (1, "rollout", 17),
    "in a backward": (0, "backward", 18),
    "in an update": (1, "update", 16),
    "while rank 1 writes": (1, "write", 20),
    "while rank 0 writes": (0, "write", 20),
    "before the manifest is in place": (0, "manifest", 20),
}


SHORT = ("in a rollout", "while rank 1 writes")  # of the default run


@pytest.mark.parametrize("how", [pytest.param(how, marks=[] if how in SHORT else pytest.mark.slow) for how in KILLS])
def test_a_killed_rank_costs_only_what_came_after_the_checkpoint(context, base, whole, tmp_path, how):
    rank, place, step = KILLS[how]
    interrupted(whole, tmp_path)
    fault = {"what": "kill", "rank": rank, "place": place, "step": step}
    run = Run(context, tmp_path, base, 2, fault=fault)
    began = time.monotonic()
    statuses = run.wait()
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 1, run.said()  # without a launcher it ends by itself
    assert time.monotonic() - began < 60
    assert f"rank {rank} has ended on {socket.gethostname()}, without which rank {1 - rank}" in run.err(1 - rank)
    assert "Traceback" not in run.err(1 - rank)
    assert newest(tmp_path / "run")[0].name == "step-00000015"
    again = Run(context, tmp_path, base, 2)
    again.done()
    assert "going on from step 15" in again.out()
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert_same_weights(tmp_path / "run", whole.folder / "run")


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2)), 3])
def test_one_rank_without_a_gradient_makes_all_skip_the_update(context, base, tmp_path, stage):
    raw = with_training(base, max_steps=4, save_every=1, keep_checkpoints=4)
    Run(context, tmp_path, raw, 2, stage, fault={"what": "nan", "rank": 1, "step": 2}).done()
    kept = {}
    for path in state.checkpoints(tmp_path / "run" / "checkpoints"):
        checkpoint = state.Checkpoint.read(path)
        kept[checkpoint.step] = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
    for name, value in kept[2].items():
        assert torch.equal(kept[3][name], value), name
        assert torch.isfinite(kept[4][name]).all()
    assert any(not torch.equal(kept[4][name], value) for name, value in kept[3].items())
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in records if "loss" in r] == [0, 0, 1, 1]


def test_a_full_disk_of_one_rank_is_said_by_all(context, base, whole, tmp_path):
    interrupted(whole, tmp_path)
    fault = {"what": "full", "rank": 1, "place": "rollout", "step": 17, "bytes": 10_000}
    run = Run(context, tmp_path, base, 2, fault=fault)
    assert run.wait() == [2, 2]
    [line] = [line for line in run.err().splitlines() if line.startswith("danceopd: ")]
    assert re.search(r"cannot write .*step-00000020: rank 1: .*File too large", line)
    assert "step-00000015 is still good" in line
    assert newest(tmp_path / "run")[0].name == "step-00000015"
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("what", ["sleep", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named(context, base, tmp_path, what):
    """Asleep in its rollout; or rank 0 stopped, which keeps what the others know."""
    rank = 1 if what == "sleep" else 0
    fault = {"what": what, "rank": rank, "place": "rollout", "step": 3}
    run = Run(context, tmp_path, base, 2, fault=fault, arguments=["--patience", "8"])
    deadline = time.monotonic() + 150
    while run.processes[1 - rank].exitcode is None:
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.1)
    run.processes[rank].kill()
    assert run.wait()[1 - rank] == 4, run.said()
    said = run.err(1 - rank)
    assert f"rank {rank} on {socket.gethostname()} " in said
    # What a rank that stopped did since the last look was not told.
    assert ("hangs in the rollout of step 3" if what == "sleep" else "was last seen in the ") in said
    assert "run the same command again" in said


def test_a_file_that_one_machine_lacks(context, base, tmp_path):
    missing = base["sources"]["two"]["weights"]
    run = Run(context, tmp_path, base, 2, fault={"what": "missing", "rank": 1, "path": missing})
    assert run.wait() == [2, 2]
    assert run.err().count("danceopd: rank 1: ") == 1
    assert missing in run.err()
    assert "danceopd: " not in run.err(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"stge": 3}}, "stge"),
        ({"zero_optimization": {"stage": 5}}, "stage"),
    ],
)
def test_what_deepspeed_cannot_be_told(context, base, tmp_path, settings, said):
    run = Run(context, tmp_path, base, 2, settings=settings)
    assert run.wait() == [2, 2]
    [line] = [line for line in run.err().splitlines() if line.startswith("danceopd: ")]
    assert said in line
    assert "deepspeed.json" in line
    assert "Traceback" not in run.said()


def test_a_port_that_another_run_has(context, base, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(sys.modules[__name__], "free_port", lambda: taken.getsockname()[1])
        run = Run(context, tmp_path, base, 1)
        assert run.wait() == [2]
    assert "another --master_port" in run.err()
    assert "Traceback" not in run.said()


def test_without_deepspeed(context, base, tmp_path):
    run = Run(context, tmp_path, base, 2, fault={"what": "without_deepspeed"})
    assert run.wait() == [2, 2]
    assert "pip install 'danceopd[deepspeed]'" in run.err()
    assert "Traceback" not in run.said()


def test_rank_0_writes_and_each_rank_has_its_traceback(context, base, tmp_path):
    run = Run(context, tmp_path, base, 2, fault={"what": "raise", "place": "rollout", "step": 6})
    assert run.wait() == [1, 1]
    for rank in range(2):
        text = (tmp_path / "run" / "ranks" / f"rank-{rank:05d}.log").read_text()
        assert text.endswith("RuntimeError: a fault of this rank\n")
        assert "in update" in text
    assert losses(tmp_path / "run").keys() == set(range(1, 7))
    assert "samples/s" in run.err()
    assert run.out(1) == ""
    assert len(run.err(1).splitlines()) == 1
    assert "rank-00001.log" in run.err(1)


@pytest.mark.parametrize(
    ("what", "rank", "why"),
    [
        ("raise", 1, "RuntimeError: a fault of this rank"),
        ("memory", 0, "RuntimeError: .*memory"),
    ],
)
def test_why_one_rank_failed_is_said_by_the_other(context, base, whole, tmp_path, what, rank, why):
    interrupted(whole, tmp_path)
    run = Run(context, tmp_path, base, 2, fault={"what": what, "rank": rank, "place": "rollout", "step": 17})
    deadline = time.monotonic() + 120
    while run.processes[rank].exitcode is None:
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.01)
    failed = time.monotonic()
    assert run.wait() == [1, 1], run.said()
    assert time.monotonic() - failed < 10  # on a machine that does other things too
    said = run.err(1 - rank)
    assert re.search(rf"rank {rank} \({why}.*\) has ended on {re.escape(socket.gethostname())}", said), said
    assert "Run the same command again to go on from the newest checkpoint" in said
    assert "Traceback" not in said


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(context, base, whole, tmp_path):
    interrupted(whole, tmp_path)
    run = Run(context, tmp_path, base, 2, fault={"what": "slow"})
    until(lambda: "/20 step [" in run.err() and len(losses(tmp_path / "run")) > 15, run)
    began = time.monotonic()
    run.processes[1].terminate()
    assert run.wait() == [143, 143], run.said()
    assert time.monotonic() - began < 30
    assert "another rank was told to stop" in run.err()
    assert 16 <= int(newest(tmp_path / "run")[0].name[-8:]) < STEPS
    Run(context, tmp_path, base, 2).done()
    assert_same_weights(tmp_path / "run", whole.folder / "run")
    assert losses(tmp_path / "run") == losses(whole.folder / "run")


def until(reached, run, seconds=120):
    """Wait for something of a run that goes on."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if reached():
                return
        except FileNotFoundError:
            pass
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.05)


# --- started by launchers ---------------------------------------------------------------------------------


class Launched:
    """`train.py` as a launcher starts it on two ranks; with a fault, the file that has them in its place."""

    def __init__(self, launcher, folder, raw, fault=None, arguments=()):
        self.folder = folder
        (folder / "config.yaml").write_text(yaml.safe_dump(raw))
        program = Path(sys.executable).parent / launcher
        started = {
            "deepspeed": ["--num_gpus", "2", "--master_port", str(free_port())],
            "torchrun": ["--standalone", "--nproc-per-node", "2"],
        }[launcher]
        script = MAKING / "zero_ranks.py" if fault else ROOT / "train.py"
        settings = ROOT / "configs" / "deepspeed" / "zero3.json"
        given = [
            "--config",
            folder / "config.yaml",
            "--deepspeed",
            settings,
            *arguments,
            f"training.output_dir={folder / 'run'}",
        ]
        with open(folder / "printed", "w") as printed:
            self.process = subprocess.Popen(
                [program, *started, script, *given],
                env={**os.environ, **ENVIRONMENT, "ZERO_FAULT": json.dumps(fault or {})},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        self.launcher = psutil.Process(self.process.pid)

    def said(self):
        return (self.folder / "printed").read_text()

    def ranks(self):
        """The ranks' processes, in order."""
        found = [p for p in self.launcher.children(recursive=True) if "training.output_dir" in " ".join(p.cmdline())]
        named = {int(p.environ().get("RANK", -1)): p for p in found}
        return [named[rank] for rank in sorted(named) if rank >= 0 and "torch" not in named[rank].name()]

    def wait_for_checkpoint(self):
        until(lambda: state.checkpoints(self.folder / "run" / "checkpoints"), self)
        ranks = self.ranks()
        assert len(ranks) == 2, self.said()
        return ranks


def ended(processes, seconds):
    began = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    assert not alive
    return time.monotonic() - began


def assert_goes_on(context, base, folder):
    """A run that was stopped has, three steps on, the weights of one that was not."""
    saved = newest(folder / "run")[0]
    steps = int(saved.name[-8:]) + 3
    raw = with_training(base, max_steps=steps)
    Run(context, folder, raw, 2).done()
    Run(context, folder / "other", raw, 2).done()
    assert_same_weights(folder / "run", folder / "other" / "run")


STOPPED = {  # who gets the signal, and the launcher's exit status
    ("deepspeed", "launcher"): -signal.SIGTERM,
    ("deepspeed", "rank"): 143,
    ("torchrun", "launcher"): 1,
    ("torchrun", "rank"): 1,
}


@pytest.mark.parametrize(
    ("launcher", "who"),
    [
        pytest.param(*key, id="-".join(key), marks=[] if key == ("deepspeed", "launcher") else pytest.mark.slow)
        for key in STOPPED
    ],
)
def test_a_signal_to_a_launcher(context, base, whole, tmp_path, launcher, who):
    interrupted(whole, tmp_path)
    run = Launched(launcher, tmp_path, base, fault={"what": "slow"})
    until(lambda: "/20 step [" in run.said() and len(losses(tmp_path / "run")) > 15, run)
    ranks = run.ranks()
    assert len(ranks) == 2
    (run.process if who == "launcher" else ranks[1]).send_signal(signal.SIGTERM)
    assert ended(ranks, 30) < 30
    assert run.process.wait(30) == STOPPED[launcher, who], run.said()
    assert "stopping after this update" in run.said() or "another rank was told to stop" in run.said()
    assert 16 <= int(newest(tmp_path / "run")[0].name[-8:]) < STEPS
    Run(context, tmp_path, base, 2).done()
    assert_same_weights(tmp_path / "run", whole.folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_launched_rank_that_dies_ends_the_others(context, base, tmp_path, launcher, rank):
    run = Launched(launcher, tmp_path, with_training(base, max_steps=5000))
    ranks = run.wait_for_checkpoint()
    ranks[rank].kill()
    assert ended(ranks, 60) < 60
    assert run.process.wait(60) not in (0, 143)
    assert re.search(rf"rank {1 - rank} on \S+ failed|return code = -9|Signal 9|exitcode: -9", run.said()), run.said()
    assert_goes_on(context, base, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_launched_rank_that_hangs_is_named(base, tmp_path, launcher):
    fault = {"what": "sleep", "rank": 1, "place": "rollout", "step": 3}
    run = Launched(launcher, tmp_path, base, fault, ["--patience", "6"])
    until(lambda: "rank 1 on" in run.said(), run)
    status = run.process.wait(60)
    assert status == (4 if launcher == "deepspeed" else 1), run.said()
    assert "hangs in the rollout of step 3" in run.said()


# --- what takes minutes -----------------------------------------------------------------------------------

KINDS = {
    "1 rank": (1, 3, {}, {}),
    "3 ranks": (3, 3, {}, {}),
    "4 ranks": (4, 3, {}, {}),
    "3 ranks in parts": (3, 3, {}, {"gradient_accumulation_steps": 2}),
    "stage 0": (2, 0, {}, {}),
    "stage 1": (2, 1, {}, {}),
    "stage 2": (2, 2, {}, {}),
    "stage 2 in parts": (3, 2, {}, {"gradient_accumulation_steps": 2}),
    "offload": (2, 3, {"offload_optimizer": {"device": "cpu"}}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["danceopd", "joint"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_ranks_has_the_losses_of_one_process(context, base, alone, tmp_path, kind, method):
    size, stage, more, training = KINDS[kind]
    settings = {"zero_optimization": {"stage": stage, **more}}
    run = Run(context, tmp_path, with_training(base, method, **training), size, settings=settings)
    found = losses(run.done())
    assert len(found) == STEPS
    assert found == pytest.approx(alone[method], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_near(context, base, alone, tmp_path, stage):
    run = Run(context, tmp_path, with_training(base, precision="bf16"), 2, stage)
    assert losses(run.done()) == pytest.approx(alone["danceopd"], rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments(context, base, tmp_path):
    raw = with_training(base, max_steps=150, save_every=3)
    Run(context, tmp_path / "whole", raw, 2).done(300)
    chance, kills, place, at_steps = random.Random(0), 0, 0, []
    while kills < 20:
        folder = tmp_path / f"killed-{place}"
        run = Run(context, folder, raw, 2)
        until(lambda run=run: "step/s" in run.err() or run.processes[0].exitcode is not None, run)
        rank, delay = chance.randrange(2), chance.uniform(0.0, 2.5)
        run.processes[rank].join(delay)
        run.processes[rank].kill()
        statuses = run.wait(60)
        if statuses == [0, 0]:  # it was done before
            assert_same_weights(folder / "run", tmp_path / "whole" / "run")
            place += 1
            continue
        assert -signal.SIGKILL in statuses or 0 in statuses, run.said()
        kills += 1
        at_steps.append(len(losses(folder / "run")))
    run = Run(context, folder, raw, 2)
    run.done(300)
    assert_same_weights(folder / "run", tmp_path / "whole" / "run")
    assert losses(folder / "run") == losses(tmp_path / "whole" / "run")
    assert len(set(at_steps)) > 3
