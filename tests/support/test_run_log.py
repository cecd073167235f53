"""A run's log: damaged lines are counted, steps done again replace the first."""

from report_results import make_records, write_log, write_page

from danceopd.support.run_log import read_log


def test_damaged_line_in_the_middle_is_reported(tmp_path):
    write_log(tmp_path, make_records(5), tail='{"step": 6, "loss\n{"step": 7, "loss": 1.0}\n')
    log = read_log(tmp_path / "log.jsonl")
    assert (log.unreadable, [r["step"] for r in log.training]) == (1, [1, 2, 3, 4, 5, 7])
    assert "one line that cannot be read" in write_page(tmp_path)


def test_resumed_run_replaces_the_steps_it_did_again(tmp_path):
    first = [{"step": step, "loss": 1.0} for step in range(1, 9)]
    again = [{"step": step, "loss": 2.0} for step in range(5, 7)]
    write_log(tmp_path, first + again)
    training = read_log(tmp_path / "log.jsonl").training
    assert [(r["step"], r["loss"]) for r in training] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
