"""The log as the page reads it: while it grows, broken, begun anew, and thinned out."""

import json
import math

import pytest

from danceopd.watch.series import RunLogReader, Series


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def update(step, loss, **rest):
    return {"step": step, "loss": loss, "loss_by_capability": {"t2i": loss}, **rest}


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.jsonl"


def test_a_log_is_read_as_it_grows(log):
    reader = RunLogReader(log)
    reader.poll()
    assert (len(reader.training), reader.version) == (0, 0)
    whole = lines(update(1, 0.5), update(2, 0.25, peak_memory_gib=1.5))
    log.write_text(whole + '{"step": 3, "lo')
    reader.poll()
    assert list(reader.training.steps) == [1, 2]
    assert list(reader.training.columns["loss/t2i"]) == [0.5, 0.25]
    assert math.isnan(reader.training.columns["peak_memory_gib"][0])
    with open(log, "a") as file:
        file.write('ss": 0.125}\n')
    before = reader.version
    reader.poll()
    assert list(reader.training.columns["loss"]) == [0.5, 0.25, 0.125]
    assert reader.unreadable == 0
    assert reader.version == before + 1
    reader.poll()
    assert reader.version == before + 1


def test_lines_that_are_no_records_are_counted_and_the_rest_is_read(log):
    broken = ["{", "[1]", '{"loss": 1}', '{"step": NaN, "loss": 1}', '{"step": true}', "\x00", "[" * 100_000]
    log.write_text("\n".join(broken) + "\n" + lines(update(1, 0.5), {"step": 2, "loss": "x", "warning": "drifts"}))
    reader = RunLogReader(log)
    reader.poll()
    assert reader.unreadable == len(broken)
    assert list(reader.training.columns["loss"])[:1] == [0.5]
    assert reader.warnings == [(2, "drifts")]


def test_what_a_resumed_run_writes_again_stands_once(log):
    log.write_text(lines(*(update(step, step / 8) for step in (1, 2, 3)), update(2, 0.75), update(3, 0.875)))
    reader = RunLogReader(log)
    reader.poll()
    assert list(reader.training.steps) == [1, 2, 3]
    assert list(reader.training.columns["loss"]) == [0.125, 0.75, 0.875]


def test_a_log_that_is_written_anew_is_read_from_its_beginning(log):
    log.write_text(lines(update(1, 0.5), update(2, 0.25)))
    reader = RunLogReader(log)
    reader.poll()
    log.with_name("new").write_text(lines(update(1, 0.125)))
    log.with_name("new").replace(log)  # as a run that goes on does
    reader.poll()
    assert list(reader.training.columns["loss"]) == [0.125]
    log.unlink()
    reader.poll()
    assert len(reader.training) == 0


def test_a_long_series_is_thinned_by_means():
    series = Series()
    for step in range(1, 1001):
        series.add(step, {"loss": step, **({"peak_memory_gib": 2.0} if step % 10 == 0 else {})})
    thin = series.thinned(100)
    assert thin["steps"] == [10.0 * i for i in range(1, 101)]
    assert thin["columns"]["loss"] == [10.0 * i - 4.5 for i in range(1, 101)]
    assert thin["columns"]["peak_memory_gib"] == [2.0] * 100
    assert series.thinned(5000)["columns"]["peak_memory_gib"][:2] == [None, None]
