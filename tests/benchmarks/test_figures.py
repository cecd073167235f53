"""benchmarks/figures.py: figures of the pages that are counted, and those that the pages say."""

from pathlib import Path

import pytest

from benchmarks import figures

DOCS = Path(__file__).parents[2] / "docs"


def cells(page):
    """The rows of all tables of a page, as lists of texts."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [line.strip("| ").split(" | ") for line in map(str.strip, lines) if line.startswith("| ")]


def test_sizes_of_a_batch():
    assert figures.parts(8, 16) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert figures.parts(32, 8) == [4, 8, 12, 16, 20, 24, 28, 32]
    assert figures.powers(12) == [1, 2, 4, 8, 12]
    assert figures.powers(12, 1.5) == [1, 2, 3, 4, 6, 8, 12]


def test_steps_are_filled_up_as_the_page_says():
    head, *rows = figures.padding(batches=1000)
    assert [row[0] for row in rows] == ["8", "16", "32", "64"]
    shown = [[cell.replace("0.0 %", "0 %") for cell in row] for row in rows]
    assert all(row in cells("rollout.md") for row in (head, *shown))


def test_prompts_are_filled_up_as_the_page_says(capsys):
    (_, *small), (_, *large) = figures.main(["lengths"])
    assert "| 1024 |" in capsys.readouterr().out
    said = next(row for row in cells("lengths.md") if row[0].startswith("Qwen-Image, "))
    assert said[-2:] == [f"{a} / {b}" for a, b in zip(small[:2], large[:2], strict=True)]


def test_bytes_of_the_released_transformers(monkeypatch):
    monkeypatch.setattr(figures, "TRANSFORMERS", ("sd3.5-medium",))
    assert figures.main(["fp8"])[0] in cells("fp8.md")


@pytest.mark.slow
def test_states_move_as_the_page_says():
    head, *rows = figures.states()
    assert [row[0] for row in rows] == ["bf16", "fp8"]
    said = {row[0]: row[1] for row in cells("rollout.md") if len(row) == len(head)}
    for precision, mean, *_ in rows:
        assert abs(float(mean.split()[0]) / float(said[precision]) - 1) < 0.3
