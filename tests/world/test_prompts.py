"""Prompts follow the grammar, and splits share nothing held out."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import (
    CLASS,
    COLOR,
    SEEDS,
    TINT,
    articles_are_right,
    generator,
    held_out_pair,
    held_out_tint,
    named,
    same_scene,
)

from danceopd.world.detector import detect
from danceopd.world.edits import KINDS, sample_edits
from danceopd.world.prompts import (
    HELD_OUT_COLORS,
    HELD_OUT_PAIRS,
    NUMBERS,
    PAIR_TASKS,
    RELATIONS,
    TASKS,
    draw_tasks,
    sample_prompts,
)
from danceopd.world.scene import render
from danceopd.world.scores import geneval_correct
from danceopd.world.sprites import CLASSES, COLORS, STYLES

PLAIN, TINTED = rf"an? (?:{CLASS})", rf"an? (?:{COLOR}) (?:{CLASS})"


GRAMMAR = {
    "single_object": PLAIN,
    "two_object": f"{PLAIN} and {PLAIN}",
    "counting": rf"(?:two|three|four) (?:{CLASS})s",
    "colors": TINTED,
    "position": f"{PLAIN} (?:{'|'.join(RELATIONS)}) {PLAIN}",
    "color_attr": f"{TINTED} and {TINTED}",
}


@pytest.mark.parametrize("style", [0, 1])
@pytest.mark.parametrize("split", ["seen", "held_out"])
def test_prompts_follow_the_grammar_and_their_pictures_them(split, style):
    tasks = [TASKS.index(task) for task in (TASKS if split == "seen" else PAIR_TASKS)]
    prompts, scene = sample_prompts(torch.tensor(tasks).repeat(100), generator(3), split=split, style=style)
    numbers = {word: n for n, word in NUMBERS.items()}
    for prompt, task in zip(prompts, itertools.cycle(tasks)):
        assert prompt.task == TASKS[task]
        assert re.fullmatch(rf"a {STYLES[style]} of {GRAMMAR[prompt.task]}", prompt.text)
        assert articles_are_right(prompt.text)
        assert prompt.objects == named(prompt.text)
        relation = [r for r in RELATIONS if f" {r} " in prompt.text]
        assert ([RELATIONS[prompt.relation]] if prompt.relation >= 0 else []) == relation
        assert prompt.count == numbers.get(prompt.text.split()[3], 1)
    seen = detect(render(scene))
    assert geneval_correct(prompts, seen).all()
    assert (scene.style == style).all()
    number = torch.tensor([p.count if p.task == "counting" else len(p.objects) for p in prompts])
    assert torch.equal(scene.occupied.sum(-1), number)  # nothing that was not asked for


@given(SEEDS, st.sampled_from([0, 1]))
def test_training_prompts_hold_nothing_held_out(seed, style):
    _, scene = sample_prompts(draw_tasks(300, None, generator(seed)), generator(seed), style=style)
    assert not (held_out_pair(scene) | held_out_tint(scene)).any()


@given(SEEDS, st.sampled_from(PAIR_TASKS))
def test_held_out_prompts_hold_something_held_out(seed, task):
    _, scene = sample_prompts(torch.full((100,), TASKS.index(task)), generator(seed), split="held_out")
    if task in ("two_object", "position"):
        assert held_out_pair(scene).all()
    else:  # every object named, in fact
        assert torch.equal(TINT[scene.objects, scene.colors], scene.occupied)


def test_held_out_sets():
    """Each class lacks one tint and every pair is of two classes, so nothing is held out entirely."""
    assert sorted(name for name, _ in HELD_OUT_COLORS) == sorted(CLASSES)
    assert all(color in COLORS[1:] for _, color in HELD_OUT_COLORS)
    assert len(HELD_OUT_PAIRS) == 6
    assert all(len(pair) == 2 and pair <= set(CLASSES) for pair in HELD_OUT_PAIRS)
    for task in set(TASKS) - set(PAIR_TASKS):
        with pytest.raises(ValueError, match="held-out prompts"):
            sample_prompts(torch.tensor([TASKS.index(task)]), generator(), split="held_out")


def test_task_weights():
    tasks = draw_tasks(2000, {"position": 3.0, "counting": 1.0}, generator())
    assert set(tasks.tolist()) == {TASKS.index("position"), TASKS.index("counting")}
    assert (tasks == TASKS.index("position")).float().mean().item() == pytest.approx(0.75, abs=0.04)
    assert draw_tasks(500, None, generator()).unique().numel() == len(TASKS)


@given(SEEDS)
def test_same_seed_same_scenes(seed):
    tasks, kinds = torch.arange(60) % len(TASKS), torch.arange(60) % len(KINDS)
    prompts, scene = sample_prompts(tasks, generator(seed))
    again, scene2 = sample_prompts(tasks, generator(seed))
    assert prompts == again
    assert same_scene(scene, scene2)
    assert torch.equal(render(scene), render(scene2))
    edits, source, result = sample_edits(kinds, generator(seed))
    edits2, source2, result2 = sample_edits(kinds, generator(seed))
    assert edits == edits2
    assert same_scene(source, source2)
    assert same_scene(result, result2)
    assert not same_scene(scene, sample_prompts(tasks, generator(seed + 1))[1])
