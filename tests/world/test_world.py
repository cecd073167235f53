"""The picture world: drawing, reading back, prompts, edits, splits, tokens."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danceopd.world.detector import detect
from danceopd.world.dit import DiTConfig
from danceopd.world.edits import GLOBAL_KINDS, KINDS, LOCAL_KINDS, sample_edits
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
from danceopd.world.scene import Scene, blank, render
from danceopd.world.scores import geneval_correct
from danceopd.world.sprites import BACKGROUNDS, CLASSES, COLORS, EMPTY, JITTER, STYLES, background_rgb
from danceopd.world.tokenizer import load_tokenizer, tokenize

SEEDS = st.integers(0, 2**40)
PAIR = torch.zeros(EMPTY + 1, EMPTY + 1, dtype=torch.bool)
for one, two in map(tuple, HELD_OUT_PAIRS):
    PAIR[CLASSES.index(one), CLASSES.index(two)] = PAIR[CLASSES.index(two), CLASSES.index(one)] = True
TINT = torch.zeros(EMPTY + 1, len(COLORS), dtype=torch.bool)
for name, color in HELD_OUT_COLORS:
    TINT[CLASSES.index(name), COLORS.index(color)] = True


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_scene(n, seed=0) -> Scene:
    """Any picture that can be drawn at all, in either split or neither."""
    g = generator(seed)

    def pick(high, *shape):
        return torch.randint(high, shape, generator=g)

    objects = pick(EMPTY + 1, n, 4)
    colors = torch.where(objects == EMPTY, 0, pick(len(COLORS), n, 4))
    return Scene(pick(len(BACKGROUNDS), n), pick(len(STYLES), n), objects, colors, pick(len(JITTER), n, 4))


def held_out_pair(scene):
    return PAIR[scene.objects[:, :, None], scene.objects[:, None]].any(-1).any(-1)


def held_out_tint(scene):
    return TINT[scene.objects, scene.colors].any(-1)


def same_scene(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in vars(a))


# Drawing and reading back


def test_rendering():
    scene = random_scene(200)
    images = render(scene)
    assert images.shape == (200, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert torch.equal(images[17:18], render(scene[17:18]))


def test_empty_picture_is_its_background():
    images = (render(blank(4, torch.arange(4))) + 1) / 2
    torch.testing.assert_close(images, background_rgb()[:, :, None, None].expand(4, 3, 32, 32))


@pytest.mark.parametrize("cell", range(4))
def test_objects_stay_in_their_cell_in_reading_order(cell):
    scene = blank(9 * 8, torch.full((72,), 3))
    scene.objects[:, cell], scene.jitter[:, cell] = torch.arange(72) % 8, torch.arange(72) // 8
    changed = (render(scene) != render(blank(72, scene.background))).any(1)
    quarters = changed.view(-1, 2, 16, 2, 16).sum((2, 4)).flatten(1)
    assert (quarters[:, cell] > 50).all()
    assert quarters.sum() == quarters[:, cell].sum()


def test_jitter_moves_the_sprite_by_its_offset():
    for j, (dy, dx) in enumerate(JITTER):
        scene = blank(1)
        scene.objects[:, 0] = 3
        centred = render(scene)
        scene.jitter[:] = j
        torch.testing.assert_close(render(scene), centred.roll((dy, dx), (2, 3)))


def test_every_object_colour_and_style_looks_different():
    axes = torch.cartesian_prod(torch.arange(len(CLASSES)), torch.arange(len(COLORS)), torch.arange(2))
    scene = blank(len(axes))
    scene.objects[:, 0], scene.colors[:, 0], scene.style = axes.T
    distance = torch.cdist(*[(render(scene)[:, :, :16, :16].flatten(1) + 1) / 2] * 2) / 768**0.5
    assert distance.fill_diagonal_(1).min() > 0.02


@pytest.mark.parametrize(("noise", "share"), [(0.0, 0.999), (0.03, 0.99)])
def test_detector_reads_pictures(noise, share):
    """noise: standard deviation in units of [0, 1], in which it is added."""
    scene = random_scene(10_000, seed=1)
    images = render(scene)
    images += 2 * noise * torch.randn(images.shape, generator=generator(2))
    seen = detect(images)
    occupied = scene.occupied
    right = (seen.scene.objects == scene.objects).all(-1) & (seen.scene.colors == scene.colors).all(-1)
    right &= ((seen.style == scene.style[:, None]) | ~occupied).all(-1)
    right &= (seen.scene.style == scene.style) | ~occupied.any(-1)
    right &= seen.scene.background == scene.background
    right &= seen.clear.all(-1) & (seen.found == occupied).all(-1)
    assert right.float().mean() >= share
    jitter = (seen.scene.jitter == scene.jitter)[occupied]
    assert jitter.float().mean() >= share
    assert seen.error.mean().item() == pytest.approx(noise, abs=0.006)
    torch.testing.assert_close(seen.confidence, (1 - seen.error / 0.2).clamp(0, 1))


def test_detector_is_sure_of_nothing_in_noise():
    images = torch.rand(100, 3, 32, 32, generator=generator()) * 2 - 1
    seen = detect(images)
    assert not seen.found.any()
    assert not seen.clear.any()


def test_detector_reads_each_picture_alone_and_clips():
    scene = random_scene(10)
    images = render(scene)
    whole, parts = detect(images), detect(images, chunk=3)
    assert same_scene(whole.scene, parts.scene)
    torch.testing.assert_close(whole.error, parts.error, atol=5e-3, rtol=0)
    beyond = torch.where(images > 0.999, 7.0, torch.where(images < -0.999, -7.0, images))
    assert same_scene(detect(beyond).scene, whole.scene)
    assert same_scene(detect(images.half()).scene, whole.scene)
    assert len(detect(images[:0]).scene) == 0


@pytest.mark.parametrize("cell", range(4))
def test_one_spoiled_cell_spoils_no_other(cell):
    """The background is judged by the whole picture."""
    scene, others = random_scene(100, seed=3), torch.arange(4) != cell
    images = render(scene).view(100, 3, 2, 16, 2, 16)
    images[:, :, cell // 2, :, cell % 2] = background_rgb()[(scene.background + 1) % 4][:, :, None, None] * 2 - 1
    seen = detect(images.view(100, 3, 32, 32))
    assert torch.equal(seen.scene.background, scene.background)
    assert torch.equal(seen.scene.objects[:, others], scene.objects[:, others])
    assert torch.equal(seen.scene.colors[:, others], scene.colors[:, others])


def test_a_part_and_a_copy_of_a_scene():
    scene = random_scene(7)
    for index in (slice(2, 5), torch.tensor([2, 3, 4])):
        assert same_scene(scene[index].clone(), scene[2:5])
        assert torch.equal(render(scene[index]), render(scene)[2:5])
    copy = scene.clone()
    copy.objects.fill_(0)
    assert not same_scene(copy, scene)


# Prompts

CLASS, COLOR = "|".join(CLASSES), "|".join(COLORS[1:])
PLAIN, TINTED = rf"an? (?:{CLASS})", rf"an? (?:{COLOR}) (?:{CLASS})"
GRAMMAR = {
    "single_object": PLAIN,
    "two_object": f"{PLAIN} and {PLAIN}",
    "counting": rf"(?:two|three|four) (?:{CLASS})s",
    "colors": TINTED,
    "position": f"{PLAIN} (?:{'|'.join(RELATIONS)}) {PLAIN}",
    "color_attr": f"{TINTED} and {TINTED}",
}


def articles_are_right(text):
    found = re.findall(r"\b(an?) (\w)", text)
    return all((article == "an") == (letter in "aeiou") for article, letter in found)


def named(text):
    """Class and colour indices in the order of the text."""
    words = re.findall(rf"(?:({COLOR}) )?\b({CLASS})s?\b", text)
    return tuple((CLASSES.index(name), COLORS.index(color) if color else 0) for color, name in words)


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


# Edits


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


# Tokens


def a(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def every_text() -> list[str]:
    """Every prompt and instruction that the world can utter, written out independently of its sampler."""
    tinted = list(itertools.product(COLORS[1:], CLASSES))
    two = list(itertools.permutations(CLASSES, 2))
    words = [a(c) for c in CLASSES]
    words += [f"{a(x)} and {a(y)}" for x, y in two]
    words += [f"{n} {c}s" for n in ("two", "three", "four") for c in CLASSES]
    words += [a(f"{k} {c}") for k, c in tinted]
    words += [f"{a(x)} {r} {a(y)}" for x, y in two for r in ("left of", "right of", "above", "below")]
    words += [
        f"{a(f'{k} {c}')} and {a(f'{l} {d}')}"
        for (k, c), (l, d) in itertools.product(tinted, tinted)  # noqa: E741
        if c != d and k != l
    ]
    texts = [f"a {lead} of {w}" for lead in ("photo", "sketch") for w in words]
    things = [a(c) for c in CLASSES] + [a(f"{k} {c}") for k, c in tinted]
    texts += [f"add {t}" for t in things]
    texts += [f"remove the {c}" for c in CLASSES]
    texts += [f"replace the {c} with {t}" for c in CLASSES for t in things if not t.endswith(f" {c}")]
    texts += [f"make the {c} {k}" for k, c in tinted]
    texts += [f"change the background to {b}" for b in ("snow", "sand", "sky", "night")]
    return [*texts, "turn it into a photo", "turn it into a sketch"]


def test_sampled_texts_are_among_all_texts():
    known, seen = set(every_text()), set()
    for split, style in itertools.product(("seen", "held_out"), (0, 1)):
        tasks = torch.tensor([TASKS.index(t) for t in (TASKS if split == "seen" else PAIR_TASKS)]).repeat(300)
        seen |= {p.text for p in sample_prompts(tasks, generator(), split=split, style=style)[0]}
        seen |= {e.text for e in sample_edits(torch.arange(900) % 6, generator(), split=split)[0]}
    assert seen <= known


def test_every_text_has_its_own_tokens_and_none_is_cut():
    texts, length = every_text(), DiTConfig().text_length
    assert len(set(texts)) == len(texts)
    encoded = [tuple(e.ids) for e in load_tokenizer().encode_batch(texts)]
    assert max(map(len, encoded)) <= length == 10
    assert len(set(encoded)) == len(texts)
    tokens = tokenize(texts, length)
    assert tokens.unique(dim=0).shape == (len(texts), length)
    assert tokens.max() < DiTConfig().vocab_size
    assert load_tokenizer().decode(encoded[-1]).strip() == texts[-1]


def test_tokens_of_any_text():
    length, pad = 10, load_tokenizer().token_to_id("<pad>")
    tokens = tokenize(["", "a photo of a dog", "Ein Größenvergleich: zebra ☂ 12345" * 5], length)
    assert tokens.shape == (3, length)
    assert tokens.dtype == torch.int64
    assert (tokens[0] == pad).all()
    assert (tokens[1] != pad).any()
    assert (tokens[1] == pad).any()
    assert (tokens[2] != pad).all()
    assert load_tokenizer().get_vocab_size() <= DiTConfig().vocab_size
    assert tokenize([], length).shape == (0, length)
