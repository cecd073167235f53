"""A suite of benchmarks goes on past a failure and says so."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import common, run


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
