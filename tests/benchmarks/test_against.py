"""The table of our updates beside published step times: by hand, and the page as it is generated."""

import json
from dataclasses import replace

import pytest

from benchmarks import against
from benchmarks.card import parts
from danceopd.planning.cluster import UTILISATION
from danceopd.support.cards import CARDS

WORK = against.Work("w", "sd3.5-medium", 384, samples=8, cards=2, without=3, with_gradient=2, published="1 s (other)")


def test_a_row_by_hand():
    operations, peak = 1e12, 2 * CARDS["h100"].operations
    row = against.row_of(WORK, operations, (0.01, 0.02), {}, None)
    total = 8 * (3 + 2 * 2) * operations  # a forward with gradient and its backward are two
    host = 3 * 0.01 + 4 * 2 * 0.02  # of a card: its 4 samples in 3 forwards, and each sample's 2 with gradient
    assert row[2:4] == ["7", f"{total / 1e12:.4g}"]
    assert row[4] == f"{total / peak:.3g} s"
    assert row[5] == f"{total / (UTILISATION * peak) + host:.3g} s"
    assert row[6:] == [f"{host:.2g} s", "–", "1 s (other)", "–", "–"]
    seen = replace(WORK, memory="7 GiB")
    assert against.row_of(seen, operations, (0.01, 0.02), {"w": 0.5}, 3 * 2**30)[7:] == [
        "0.5 s", "1 s (other)", "3.0 GiB", "7 GiB",
    ]  # fmt: skip


def test_only_what_was_measured_on_a_card_of_this_peak_is_measured(tmp_path):
    for number, device in enumerate(("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H200", "a CPU")):
        rows = [{"name": f"on {device}", "milliseconds": [1, 2, 3]}]
        (tmp_path / f"against-{number}.json").write_text(json.dumps({"device": {"name": device}, "rows": rows}))
    assert against.read_measured(tmp_path) == {"on NVIDIA H100 80GB HBM3": 0.002, "on NVIDIA H200": 0.002}


def test_what_the_card_check_measures_is_one_of_the_works():
    assert parts.LORA_STEP in {work.name for work in against.works()}


def test_the_works_are_those_that_were_published():
    names = {work.name: work for work in against.works()}
    assert len(names) == len(against.works())
    every = names["on-policy distillation, every step asked"]
    assert (every.samples, every.cards, every.resolution, every.evaluations()) == (64, 4, 384, 40)
    guided = names["on-policy distillation, every step asked, guidance 4.5"]
    assert guided.evaluations() == 80
    once = names["ours: one state asked, low-t"]
    assert 9 < once.evaluations() < 11


def test_the_host_table_has_the_times_of_its_file(tmp_path):
    times = {"eager": [1, 2, 3], "static": [0.1, 0.2, 0.3]}
    names = [(f"{part}, {p}, {how}", how) for part in ("query", "match") for p in ("float32", "fp8") for how in times]
    rows = [{"name": name, "milliseconds": times[how], "ratio": [9, 10, 11]} for name, how in names]
    file = tmp_path / "host.json"
    file.write_text(json.dumps({"device": {"name": "a host", "torch": "2"}, "rows": rows}))
    table = against.host_table(file)
    assert table.count("| 2 ms | 0.2 ms | 10 (9 to 11) |") == 4
    assert "thread, a host, torch 2." in table


@pytest.mark.slow
def test_the_page_is_what_is_generated():
    page = against.PAGE.read_text(encoding="utf-8")
    assert page == against.page(), "python -m benchmarks.against --write writes docs/benchmarks.md again"
