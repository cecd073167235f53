"""What is kept of LoRAs that are merged, and the benchmark's own arithmetic."""

import pytest

from danceopd.miniature.looks import LOOKS
from danceopd.reproduce.merging import kept, look_sets


def test_only_looks_that_fit_together_are_asked_for_together():
    sets = look_sets(8)
    assert sets[0] == ()
    assert {looks[0] for looks in sets if len(looks) == 1} == LOOKS.keys()
    pairs = {looks for looks in sets if len(looks) == 2}
    assert ("night", "wood") in pairs
    assert ("night", "sand") not in pairs  # a picture has one background
    assert len(pairs) == 28 - 4
    assert len(look_sets(2)) == 4


def test_kept_is_relative_to_each_lora_by_hand():
    by_hand = {"": 0.5, "night": 0.4, "wood": 0.8, "night + wood": 0.2}
    assert kept(by_hand, by_hand) == {"kept": 1, "base_kept": 1, "pairs": 1}
    own = {"": 0.25, "night": 0.4, "wood": 0.4, "night + wood": 0.3}
    assert kept(own, by_hand) == pytest.approx({"kept": 0.8 / 1.2, "base_kept": 0.5, "pairs": 1.5})
