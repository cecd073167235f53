"""What the log and the terminal say about a run's speed."""

import json
from collections import Counter

import pytest
import torch
from torch import nn
from world_runs import config_of

from danceopd.core.phase import phase, recorders
from danceopd.models.forward_cost import Cost
from danceopd.support.cards import CARDS
from danceopd.training import speed as speed_module
from danceopd.training.loop import Trainer
from danceopd.training.progress import Progress
from danceopd.training.speed import Phases, Speed, told
from danceopd.world.build import build

HOST = torch.device("cpu")


def test_phases_are_shares_of_their_own_time_and_what_lies_between_updates_is_none(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    phases = Phases(HOST)
    with phases.update():
        passes(1)
        with phase("outer"):
            passes(3)
            with phase("inner"):
                passes(2)
            passes(3)
    passes(100)
    with phases.update(), phase("inner"):
        passes(1)
    assert phases.shares() == {"rest": 0.1, "outer": 0.6, "inner": 0.3}
    assert phases.shares() == {}
    assert not recorders


def test_a_record_by_hand():
    speed = Speed(HOST, nn.Linear(1, 1), {100: Cost(1000, 10), 300: Cost(4000, 30)})
    spent = Counter(student=70, sources=10, backward=20, padding=5)
    record = speed.record(2.0, 8, 200, spent, Counter())
    assert record["samples_per_second"] == 4
    assert record["tokens_per_second"] == 80 * 20 / 2  # between the sizes that were counted
    assert "mfu" not in record  # a CPU has no published peak
    assert 0.05 < record["peak_memory_gib"] < 64
    masked = speed.record(2.0, 8, 200, spent, Counter(computed=500, padding=100))
    assert masked["tokens_per_second"] == (500 - 100) / 2


@pytest.mark.parametrize(("adapter", "operations"), [(False, (80 + 20) * 1000), (True, (80 + 10) * 1000)])
def test_mfu_takes_the_models_own_operations_and_all_cards(monkeypatch, adapter, operations):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 3 * 2**30)
    student = nn.Module()
    if adapter:
        student.layer = lambda *_: None
    speed = Speed(torch.device("cuda"), student, {100: Cost(1000, 10)}, ranks=4)
    speed.phases.on_host = True
    record = speed.record(0.5, 8, 100, Counter(student=70, sources=10, backward=20, padding=5), Counter())
    assert record["mfu"] == pytest.approx(operations / 0.5 / (4 * CARDS["h100"].operations))
    assert record["peak_memory_gib"] == 3


def test_the_terminal_says_it_in_one_line():
    record = {
        "samples_per_second": 0.5312, "tokens_per_second": 35_210.0, "mfu": 0.412, "peak_memory_gib": 34.61,
        "phases": {"rollout": 0.61, "backward": 0.2, "step": 0.005},
    }  # fmt: skip
    assert told(record) == "0.531 samples/s, 35.2k tokens/s, MFU 41%, 34.6 GiB, rollout 61% backward 20%"
    assert told({"samples_per_second": 812.0, "peak_memory_gib": 0.9}) == "812 samples/s, 0.9 GiB"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"t2i": 0.04019, "edit": 0.0542}, "loss t2i 0.0402, edit 0.0542"),
        ({"t2i": 0.04019}, "loss 0.0450"),
        ({str(i): 0.01 for i in range(64)}, "loss 0.0450"),
    ],
)
def test_the_bar_says_what_is_being_learnt_and_the_last_scores(losses, expected, raw):
    record = {"loss": 0.045, "loss_by_capability": losses, "skipped": 0}
    record |= {"samples_per_second": 812.0, "peak_memory_gib": 0.9}
    with Progress(config_of(raw), 0) as progress:
        progress.show(1, record, {}, 0.1)
        assert progress.bar.postfix == f"{expected}, 812 samples/s, 0.9 GiB"
        progress.scored({"geneval_overall": 0.3761})
        progress.show(2, record, {}, 0.2)
        assert progress.bar.postfix == f"{expected}, geneval overall 0.376, 812 samples/s, 0.9 GiB"


def test_a_run_logs_its_speed(raw, capsys):
    raw["training"].update(max_steps=2, sample_every=0, log_every=1)
    raw["evaluation"]["times"] = 0
    config = config_of(raw)
    trainer = Trainer(config, build(config))
    trainer.run()
    log = [json.loads(line) for line in (config.training.output_dir / "log.jsonl").read_text().splitlines()]
    (first, second) = [line for line in log if "loss" in line]
    for record in (first, second):
        assert {"samples_per_second", "tokens_per_second", "peak_memory_gib"} <= record.keys()
        assert {"rollout", "query", "match", "backward", "step"} <= record["phases"].keys()
        assert sum(record["phases"].values()) == pytest.approx(1)
    assert "route" in first["phases"]
    assert "route" not in second["phases"]  # its batch was drawn in the first
    # The same by hand: text and picture tokens of the embedded network, on each evaluation but a backward's.
    spent = second["network_evaluations"] - first["network_evaluations"] - 2 * config.training.batch_size
    tokens = second["tokens_per_second"] * config.training.batch_size / second["samples_per_second"] / spent
    costs = trainer.speed.costs.values()
    assert tokens == pytest.approx(sum(cost.tokens for cost in costs) / len(costs))
    assert "tokens/s" in capsys.readouterr().err
