"""Edits change what their text says."""

import pytest
import torch
from hypothesis import given
from scenes import SEEDS, TINT, articles_are_right, generator, held_out_pair, held_out_tint, named

from danceopd.world.edits import GLOBAL_KINDS, KINDS, LOCAL_KINDS, sample_edits
from danceopd.world.sprites import BACKGROUNDS, COLORS, EMPTY, STYLES


@given(SEEDS)
def test_training_edits_hold_nothing_held_out(seed):
    _, *scenes = sample_edits(torch.arange(300) % len(KINDS), generator(seed))
    for scene in scenes:
        assert not (held_out_pair(scene) | held_out_tint(scene)).any()


@given(SEEDS)
def test_held_out_sources_have_held_out_tints_only(seed):
    _, source, _ = sample_edits(torch.arange(120) % len(KINDS), generator(seed), split="held_out")
    tinted = source.colors > 0
    assert TINT[source.objects, source.colors][tinted].all()
    assert held_out_pair(source).any()


@pytest.mark.parametrize("split", ["seen", "held_out"])
@pytest.mark.parametrize("kind", KINDS)
def test_edit_changes_what_its_text_says_and_no_more(kind, split):
    n = 150
    edits, source, result = sample_edits(torch.full((n,), KINDS.index(kind)), generator(5), split=split)
    changed = (source.objects != result.objects) | (source.colors != result.colors)
    number = 0 if kind in GLOBAL_KINDS else 1
    assert (changed.sum(-1) == number).all()
    assert ((source.background != result.background) == (kind == "background-change")).all()
    assert ((source.style != result.style) == (kind == "style-change")).all()
    assert torch.equal(source.jitter, result.jitter)
    assert source.occupied.any(-1).all()
    for i, edit in enumerate(edits):
        assert edit.kind == kind
        assert articles_are_right(edit.text)
        before, after = (
            {(c, k) for c, k in zip(s.objects[i].tolist(), s.colors[i].tolist(), strict=True) if c != EMPTY}
            for s in (source, result)
        )
        lost, new, things = before - after, after - before, named(edit.text)
        assert len(before) == len({c for c, _ in before})  # "the dog" is never ambiguous
        if kind == "subject-add":
            assert (lost, new) == (set(), set(things))
        elif kind == "subject-remove":
            assert ({c for c, _ in lost}, new) == ({things[0][0]}, set())
        elif kind == "subject-replace":
            assert ({c for c, _ in lost}, new) == ({things[0][0]}, {things[1]})
        elif kind == "color-alter":
            [(cls, _)], word = things, edit.text.split()[-1]
            assert new == {(cls, COLORS.index(word))}
            assert {c for c, _ in lost} == {cls}
        elif kind == "background-change":
            assert edit.text == f"change the background to {BACKGROUNDS[result.background[i]]}"
        else:
            assert edit.text == f"turn it into a {STYLES[result.style[i]]}"
        if kind in LOCAL_KINDS and kind != "subject-add":
            assert changed[i].nonzero().item() == edit.target
        else:
            assert edit.target == -1
