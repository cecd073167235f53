"""`danceopd miniature`: what it refuses, before anything is written."""

from contextlib import suppress

import pytest

from danceopd.cli.parser import main
from danceopd.miniature import card


@pytest.mark.parametrize("action", ["data", "benchmark"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--size", "0"], "--size: must be at least 1, not 0"),
        (["--size", "-3"], "--size: must be at least 1, not -3"),
        (["--seed", str(2**32)], "--seed: must be at most 4294967295, not 4294967296"),
        (["--seed", "-1"], "--seed: must be at least 0, not -1"),
    ],
)
def test_sizes_and_seeds_that_no_sample_has_are_refused(action, wrong, said, tmp_path, capsys):
    with suppress(SystemExit):  # of argparse
        assert main(["miniature", action, "--folder", str(tmp_path / "out"), *wrong]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["miniature", "--size", "3"], "list uses no --size; leave it out, or give benchmark or data"),
        (["miniature", "benchmark", "--capabilities", "t2i"], "benchmark uses no --capabilities"),
        (["miniature", "data", "--only", "vae"], "data uses no --only; leave it out, or give train"),
        (["sources", "card", "--only", "t2i"], "card uses no --only; leave it out, or give train"),
        (["sources", "--folder", "x"], "list uses no --folder"),
    ],
)
def test_an_option_that_an_action_would_ignore_is_refused(typed, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(typed) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_largest_seed_is_taken(tmp_path):
    largest = ["--size", "1", "--seed", str(2**32 - 1)]
    assert not main(["miniature", "data", "--folder", str(tmp_path / "out"), *largest])
    assert (tmp_path / "out" / "manifest.jsonl").exists()


def test_a_card_of_nothing_is_refused_before_anything_is_scored(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "write_card", lambda: "README.md")
    assert not main(["miniature", "card"])  # no folder is named: of what ships
    assert "wrote README.md" in capsys.readouterr().out
    monkeypatch.setattr(card, "write_card", lambda: pytest.fail("scored"))
    assert main(["miniature", "card", "--folder", str(tmp_path / "nowhere")]) == 2
    assert "nowhere holds neither a pipeline nor a source" in capsys.readouterr().err
