"""The paper's claims: verdicts on both sides of their thresholds."""

import pytest
from reproductions import by_text, everything, runs, score, source, trained

from danceopd.reproduce.claims import onset
from danceopd.reproduce.results import (
    MISSING,
    NOT,
    REPRODUCED,
    UNDECIDED,
    read,
    tables_of,
)

STYLE = "C: the student closes 85.3 % of its gap to the style source"


MULTIPLY = "D: absorbed and inference guidance multiply: nearer to the source at alpha x beta than at beta alone"


def test_claims_of_a_complete_result(tmp_path):
    everything(tmp_path)
    found = by_text(tables_of(read(tmp_path)))
    assert found["A: DanceOPD has the best edit average"].verdict == REPRODUCED
    assert found["A: DanceOPD has the best GenEval overall"].verdict == UNDECIDED  # all alike
    assert found["A: DanceOPD keeps at least 0.98 of the T2I source's overall"].verdict == NOT  # 0.8 of 0.85
    assert found["One query beats four and sixteen"].verdict == REPRODUCED
    style = found[STYLE]
    assert style.verdict == REPRODUCED
    assert "88.9 ± 0.6 %" in style.figures
    assert found[MULTIPLY].verdict == REPRODUCED
    assert "0.010 at alpha x beta" in found[MULTIPLY].figures
    over = found["D: a product of 49 falls below the best composition"]
    assert over.verdict == REPRODUCED
    assert "below the unguided 0.700 from 6 for students, from 6 for the source itself" in over.figures
    assert not any(claim.verdict == MISSING for claim in found.values())


@pytest.mark.parametrize(
    ("ours", "expected", "words"),
    [
        ((0.9, 0.91, 0.92), REPRODUCED, "times fewer"),
        ((0.7, 0.7, 0.95), UNDECIDED, "reached in 1 of 3"),
        ((0.7, 0.71, 0.72), NOT, "reached in 0 of 3"),
        ((0.8, 0.81, 0.9), UNDECIDED, "of its evaluations"),
        ((0.9,), UNDECIDED, "times fewer"),
    ],
)
def test_fewer_evaluations_are_decided_over_seeds(ours, expected, words):
    rows = {"danceopd": trained("danceopd", runs=runs(*ours)), "flow_opd": trained("f", runs=runs(0.8, 0.8, 0.8))}
    claim = by_text({"A": rows})["A: DanceOPD reaches the best of Flow-OPD in fewer network evaluations"]
    assert claim.verdict == expected
    assert words in claim.figures


@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        ((0.9, 0.91, 0.89), REPRODUCED),
        ((0.851, 0.853, 0.852), REPRODUCED),
        ((0.828, 0.83, 0.829), NOT),
        ((0.8, 0.81, 0.79), NOT),
        ((0.8, 0.85, 0.9), UNDECIDED),
        ((0.99,), UNDECIDED),
    ],
)
def test_the_share_of_the_gap_is_decided_over_seeds(closed, expected):
    rows = {name: source(name, style_share=score([v])) for name, v in (("source_t2i", 0.0), ("source_style", 1.0))}
    rows["danceopd"] = trained("danceopd", seeds=range(len(closed)), style_share=score(closed))
    assert by_text({"C": rows})[STYLE].verdict == expected


@pytest.mark.parametrize(("steps16", "expected"), [(8.7, REPRODUCED), (8.55, UNDECIDED), (8.4, NOT)])
def test_the_band_of_rollout_steps(steps16, expected):
    rows = {name: trained(name) for name in ("danceopd", "steps20", "steps28")}
    rows["steps16"] = trained("steps16", edit=steps16)
    assert (
        by_text({"ablations": rows})[
            "16 rollout steps keep at least 0.95 of the edit average of 8 (the default here), 20 and 28"
        ].verdict
        == expected
    )


def test_guidance_that_was_not_absorbed_does_not_multiply():
    own = {beta: 0.9 - 0.1 * beta for beta in (1, 2, 4)}
    rows = {"source_t2i": source("source_t2i", **{f"beta{b}": score([v]) for b, v in own.items()})}
    for absorbed, expected in ((2, REPRODUCED), (1, NOT)):
        scores = {f"beta{b}": score([own[absorbed * b] + x for x in (0.0, 0.01, 0.02)]) for b in (1, 2)}
        rows["alpha2"] = trained("alpha2", **scores)
        assert by_text({"D": rows})[MULTIPLY].verdict == expected


def test_where_too_much_guidance_sets_in():
    assert onset({1: 0.7, 2: 0.8, 4: 0.6, 6: 0.7, 9: 0.5, 49: 0.1}, 0.7) == 9
    assert onset({1: 0.7, 2: 0.8}, 0.7) is None
