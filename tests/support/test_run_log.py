"""A run's log: damaged lines are counted, steps done again replace the first."""

import json
import math
import os
import resource
import signal

import pytest
from report_results import make_records, write_log, write_page

from danceopd.support.run_log import RunLog, read_log
from danceopd.watch.series import RunLogReader


def test_damaged_line_in_the_middle_is_reported(tmp_path):
    write_log(tmp_path, make_records(5), tail='{"step": 6, "loss\n{"step": 7, "loss": 1.0}\n')
    log = read_log(tmp_path / "log.jsonl")
    assert (log.unreadable, [r["step"] for r in log.training]) == (1, [1, 2, 3, 4, 5, 7])
    assert "one line that cannot be read" in write_page(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_by_capability": 5},
        {"loss_by_capability": [["t2i"]]},
        {"loss_by_capability": {"t2i": "high"}},
        {"loss": "high"},
        {"network_evaluations": {}},
        {"health": []},
        {"evaluation": 1.0},
        {"step": 10**400},
        {"loss": 10**400},
    ],
)
def test_a_line_of_odd_types_is_unreadable_and_a_page_is_made(tmp_path, fields):
    write_log(tmp_path, [*make_records(5), {"step": 6, "loss": 1.0, **fields}, {"step": 7, "loss": 1.0}])
    log = read_log(tmp_path / "log.jsonl")
    assert (log.unreadable, [r["step"] for r in log.training]) == (1, [1, 2, 3, 4, 5, 7])
    assert "one line that cannot be read" in write_page(tmp_path)
    reader = RunLogReader(tmp_path / "log.jsonl")  # what the page to watch has
    reader.poll()
    assert len(reader.training) >= 6


def test_a_loss_that_is_not_finite_is_kept(tmp_path):
    write_log(tmp_path, [{"step": 1, "loss": math.nan, "loss_by_capability": {"t2i": None}}])
    assert len(read_log(tmp_path / "log.jsonl").training) == 1


def test_resumed_run_replaces_the_steps_it_did_again(tmp_path):
    first = [{"step": step, "loss": 1.0} for step in range(1, 9)]
    again = [{"step": step, "loss": 2.0} for step in range(5, 7)]
    write_log(tmp_path, first + again)
    training = read_log(tmp_path / "log.jsonl").training
    assert [(r["step"], r["loss"]) for r in training] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


def test_a_resume_drops_the_later_updates_and_lines_that_are_none(tmp_path):
    path = tmp_path / "log.jsonl"
    odd = [
        "5",
        "[]",
        '"step"',
        '{"step": "x"}',
        '{"step": null}',
        '{"step": true}',
        "[" * 9999,
        '{"step": 1e999}',
        "",
        "{",
    ]
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 9)]
    path.write_text("\n".join(lines[:3] + odd + lines[3:]) + '\n{"step": 5, "lo')
    log = RunLog(tmp_path, 5)
    log.write(6, {"loss": 2.0, "say": "a\u2028b"})
    log.close()
    found = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert read_log(path).training[-1]["say"] == "a\u2028b"


def test_a_failing_write_leaves_the_log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 101)))
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))  # as a full disk
        with pytest.raises(OSError, match=r"log\.jsonl"):
            RunLog(tmp_path, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", [0, 1])
def test_a_link_in_the_logs_place_is_not_followed(tmp_path, step):
    (tmp_path / "other").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "other")
    log = RunLog(tmp_path, step)
    log.write(3, {"loss": 1.0})
    log.close()
    assert (tmp_path / "other").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert not (tmp_path / "log.jsonl").is_symlink()


def test_the_log_is_as_readable_as_the_umask_says(tmp_path):
    old = os.umask(0o077)
    try:
        RunLog(tmp_path, 0).close()
    finally:
        os.umask(old)
    assert (tmp_path / "log.jsonl").stat().st_mode & 0o777 == 0o600
