"""Results over seeds: verdicts, differences, costs and the chosen rate."""

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reproductions import NOISE, source, trained

from danceopd.reproduce.matrix import LEARNING_RATES
from danceopd.reproduce.results import (
    GEDIT,
    MISSING,
    NOT,
    REPRODUCED,
    UNDECIDED,
    by_seed,
    cheaper,
    chosen_rate,
    difference,
    once,
    rates,
    read,
    seeds_needed,
    tables_of,
    verdict,
)
from danceopd.support.errors import UserError


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        ((0.1, 0.04), REPRODUCED),
        ((-0.1, 0.04), NOT),
        ((0.1, 0.06), UNDECIDED),
        ((0.1, None), UNDECIDED),
        (None, MISSING),
    ],
)
def test_verdicts(gap, expected):
    assert verdict(gap) == expected


def test_differences_are_taken_seed_by_seed():
    ours, theirs = by_seed(trained("a", edit=9.1), GEDIT), by_seed(trained("b", edit=9.0), GEDIT)
    value, error = difference(ours, dict(reversed(theirs.items())))
    assert value == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-9)
    value, error = difference(ours, by_seed(trained("b", edit=9.0, seeds=(0, 1)), GEDIT))
    expected = math.sqrt(statistics.variance(NOISE) / 3 + statistics.variance(NOISE[:2]) / 2)
    assert error == pytest.approx(expected)
    value, error = difference(ours, by_seed(source("c", edit=9.0), GEDIT))
    assert value == pytest.approx(0.1)
    assert error == pytest.approx(statistics.stdev(NOISE) / math.sqrt(3))
    assert difference(ours, {None: 10.0}, share=0.9)[0] == pytest.approx(0.1)
    assert difference({0: 1.0}, {0: 0.5}) == (0.5, None)
    assert difference(ours, by_seed(None, GEDIT)) is None
    assert difference(by_seed({"seeds": []}, GEDIT), theirs) is None


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.integers(2, 50))
def test_as_many_seeds_as_are_needed_decide_a_difference(value, deviation, seeds):
    gap = value, deviation / math.sqrt(seeds)
    needed = seeds_needed(gap, seeds)
    assert verdict((value, deviation / math.sqrt(needed) * (1 - 1e-9))) == REPRODUCED
    assert needed == 1 or verdict((value, deviation / math.sqrt(needed - 1) * (1 + 1e-9))) == UNDECIDED
    assert seeds_needed((0.0, 0.1), seeds) is seeds_needed((0.1, None), 1) is None


def test_how_much_cheaper():
    ours = [[0, 0.7, 8.0], [100, 0.9, 8.0], [200, 0.95, 8.0]]
    theirs = [[0, 0.7, 8.0], [400, 0.8, 8.0]]
    assert cheaper(ours, theirs) == pytest.approx(50 / 400)
    assert cheaper(theirs, ours) == math.inf
    assert cheaper(ours, [[0, 0.7, 8.0], [400, 0.6, 8.0]]) == 0.0
    assert cheaper(ours, [[0, 0.8, 8.0], [400, 0.6, 8.0]]) == math.inf


def test_the_chosen_rate_is_the_best():
    rows = {rate: trained("a", t2i=t, seeds=(0,)) for rate, t in ((1e-4, 0.8), (3e-4, 0.83), (1e-3, 0.82))}
    assert chosen_rate(rows) == 3e-4
    rows[1e-3] = trained("a", t2i=0.8, edit=9.4, seeds=(0,))
    assert chosen_rate(rows) == 1e-3


def test_the_matrix_uses_the_rates_that_the_grid_chose():
    grid = tables_of(read(Path(__file__).parents[2] / "results"))["grid"]
    assert {method: chosen_rate(rows) for method, rows in rates(grid).items()} == LEARNING_RATES


@pytest.mark.parametrize("text", ["", "{torn", "[]", "[" * 5000 + "]" * 5000])
def test_a_damaged_results_file_is_named(tmp_path, text):
    (tmp_path / "E.json").write_text(text)
    with pytest.raises(UserError, match=r"E\.json is damaged .*; restore it, or remove it"):
        read(tmp_path)


def test_what_is_measured_is_measured_once(tmp_path):
    path, made = tmp_path / "measured" / "base.json", []

    def make():
        made.append(0.5)
        return {"geneval_overall": 0.5}

    assert once(path, make) == once(path, make) == {"geneval_overall": 0.5}
    assert made == [0.5]
    path.write_text("{")
    with pytest.raises(UserError, match=r"base\.json.*remove it"):
        once(path, make)
