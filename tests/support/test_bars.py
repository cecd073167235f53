"""Long work in a file: lines that only follow each other."""

import pytest
import torch
from diffusers import Flux2KleinPipeline
from tqdm import tqdm

from danceopd.cli.parser import main
from danceopd.miniature.shipped import PIPELINE
from danceopd.models.loading import load
from danceopd.support.bars import bar


def test_a_file_gets_lines_and_nothing_is_erased(capsys):
    with bar(total=3, desc="rows") as shown:
        for _ in range(3):
            shown.update()
            tqdm.write("a warning")
    said = capsys.readouterr()
    assert "\r" not in said.err
    assert said.out == "a warning\n" * 3
    lines = [line for line in said.err.splitlines() if line]
    assert lines[0].startswith("rows: 0/3")
    assert lines[-1].startswith("rows: 3/3")
    assert len(lines) == len(set(lines))


def test_what_is_disabled_says_nothing(capsys):
    assert list(bar([1, 2], disable=True)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_quiet_shows_no_bar(capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "0")  # which comes back after the test
    assert main(["train", "--quiet", "--config", "nowhere.yaml"]) == 2
    capsys.readouterr()
    with bar([1, 2], "rows") as shown:
        assert list(shown) == [1, 2]
        shown.set_postfix_str("loss 1")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("left_on", [True, False])
def test_the_libraries_bars_do_not_fill_a_file_and_are_as_before_after_it(left_on, capsys):
    from diffusers.utils import logging

    switch = logging.enable_progress_bar if left_on else logging.disable_progress_bar
    switch()
    try:
        load(Flux2KleinPipeline, PIPELINE, dtype=torch.float32)  # the standard error is no terminal here
        assert "Loading" not in capsys.readouterr().err
        assert logging.is_progress_bar_enabled() == left_on
    finally:
        logging.enable_progress_bar()
