"""The parts of the card check on the pretend card: what they capture, where tensors lie, and what they find right."""

import pytest
import torch
from card_reports import quick_report
from pretend_card import NAME, pretend_card

from benchmarks import common, kernel_bench
from benchmarks.card import network, parts


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "device", lambda: torch.device(NAME))
    monkeypatch.setattr(network, "TINY", network.Size(32, 1, 2, 1, 4, 4, 4, 16))
    with pretend_card():
        yield quick_report(tmp_path, monkeypatch)


def test_the_machine_is_the_card(report):
    parts.machine(report)
    assert report.rows[0]["note"] == "a pretend card, compute capability (9, 0)"
    assert report.rows[0]["description"]["kind"] == NAME
    assert not [row for row in report.rows if row.get("ok") is False]


def test_operations_are_right_and_timed_as_graphs(report):
    parts.kernels(report)
    errors = [row for row in report.rows if row["unit"] == "error"]
    assert len(errors) == 30
    assert all(row["ok"] for row in errors)
    cases = len(kernel_bench.cases((2, 4, 32, 32), torch.float32, NAME))  # in float32 and bfloat16
    assert sum("of a copy's bandwidth" in row.get("note", "") for row in report.rows) == 2 * cases


def test_queries_are_right(report):
    parts.query(report)
    assert [row["ok"] for row in report.rows] == [True, True]


@pytest.mark.slow  # each forward is hundreds of operations that the card's dispatch sees one by one
def test_rollouts_are_captured_and_right(report):
    parts.rollout(report)
    assert [row["ok"] for row in report.rows] == [True] * 6
    assert "captured" in report.rows[1]["name"]
    assert all(row["peak_MiB"] is not None for row in report.rows)


@pytest.mark.slow  # as rollouts, and an update is several of them
def test_updates_and_their_profile_are_captured_and_right(report):
    parts.update(report)
    captured, eager, narrow, lora = (row for row in report.rows if row["unit"] == "ms")
    assert captured["losses"] == pytest.approx(eager["losses"], rel=0.02)
    assert captured["ok"]
    assert eager["ok"]
    assert narrow["ok"]
    assert lora["ok"]
    assert not list(report.out.iterdir())  # a measurement of no GPU
    report.rows.clear()
    parts.profile(report)
    assert report.rows[0]["value"] > 50


def test_what_needs_a_gpu_is_left_out(report):
    parts.tests(report)
    parts.zero3(report)
    assert ["left out" in row["note"] for row in report.rows] == [True, True]
