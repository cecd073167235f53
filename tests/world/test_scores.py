"""The scores of pictures, against rules worked out on the scenes themselves."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danceopd.world.detector import Detection, detect
from danceopd.world.edits import KINDS, LOCAL_KINDS, sample_edits
from danceopd.world.prompts import RELATIONS, TASKS, Prompt, sample_prompts
from danceopd.world.scene import blank, render
from danceopd.world.scores import edit_scores, geneval_correct, style_share
from danceopd.world.sprites import EMPTY, JITTER

N = 120
ROW = torch.arange(N)
KIND = ROW % len(KINDS)
CENTRED, FIRST, LAST = JITTER.index((0, 0)), JITTER.index((-1, -1)), JITTER.index((1, 1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def is_kind(name):
    return KIND.eq(KINDS.index(name))


@pytest.fixture(scope="module")
def edited():
    """Twenty edits of each kind."""
    return sample_edits(KIND, generator(7))


def scores_of(edited, output):
    """output: a scene or pictures."""
    images = output if isinstance(output, torch.Tensor) else render(output)
    return edit_scores(*edited, detect(images))


def unlike(edited, cell):
    """[N] bool: the object of this cell is there before and after."""
    _, source, expected = edited
    return source.occupied[:, cell] & expected.occupied[:, cell]


# Edits


def test_perfect_result(edited):
    scores = scores_of(edited, edited[2])
    assert (scores["sc"] == 10).all()
    assert (scores["pq"] > 9.99).all()
    assert (scores["o"] > 9.9).all()
    assert all(s.dtype == torch.float32 and s.shape == (N,) for s in scores.values())


def test_source_returned_unchanged(edited):
    scores = scores_of(edited, edited[1])
    assert (scores["sc"] == 0).all()
    assert (scores["o"] == 0).all()
    assert (scores["pq"] > 9.99).all()


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_noise(edited, draw):
    scores = scores_of(edited, draw(N, 3, 32, 32, generator=generator()) * 2 - 1)
    assert all((s == 0).all() for s in scores.values())


def recolour(edited, out, cell):
    out.colors[:, cell] = (out.colors[:, cell] + 1) % 6
    return edited[2].occupied[:, cell]


def remove(edited, out, cell):
    out.objects[:, cell], out.colors[:, cell] = EMPTY, 0
    return edited[2].occupied[:, cell]


def other_class(edited, out, cell):
    out.objects[:, cell] = (out.objects[:, cell] + 1) % 8
    return edited[2].occupied[:, cell]


def extra(edited, out, cell):
    free = ~out.occupied[:, cell]
    out.objects[free, cell] = 2
    return free


def move(edited, out, cell):
    """Into the first empty cell; every expected scene has one."""
    to = (~out.occupied).long().argmax(-1)
    for part in (out.objects, out.colors):
        part[ROW, to] = part[:, cell]
    remove(edited, out, cell)
    return unlike(edited, cell)


def jump(edited, out, cell):
    """Two pixels to the side, where the expected place was one pixel the other way."""
    out.jitter[:, cell] = LAST
    return unlike(edited, cell) & (~is_kind("subject-replace"))


def repaint(edited, out, cell):
    out.background = (out.background + 1 + cell % 3) % 4
    return torch.ones(N, dtype=torch.bool)


def restyle(edited, out, cell):
    out.style = 1 - out.style
    return edited[2].occupied.any(-1)


@pytest.mark.parametrize("change", [recolour, remove, other_class, extra, move, jump, repaint, restyle])
def test_whatever_is_wrong_costs(edited, change):
    edits, source, expected = edited
    expected = expected.clone()
    expected.jitter[:] = FIRST
    source = source.clone()
    source.jitter[:] = FIRST
    kinds = set()
    for cell in range(4):
        out = expected.clone()
        applies = change(edited, out, cell)
        sc = scores_of((edits, source, expected), out)["sc"]
        assert (sc[applies] <= 8).all()
        assert (sc[~applies] >= 0).all()
        kinds |= set(KIND[applies].tolist())
    assert len(kinds) >= len(KINDS) - 1  # a jump says nothing of a replacement


def test_price_of_one_wrong_part_of_the_rest(edited):
    """A quarter of the rest (three cells and the background); for a style a fifth (four cells and that)."""
    out = edited[2].clone()
    repaint(edited, out, 0)
    sc = scores_of(edited, out)["sc"]
    for kind, price in {
        **dict.fromkeys(LOCAL_KINDS, 7.5),
        "background-change": 0.0,
        "style-change": 8.0,
    }.items():
        torch.testing.assert_close(sc[is_kind(kind)], torch.full((N // 6,), price))


def test_one_pixel_of_drift_is_free(edited):
    edits, source, expected = edited
    expected = expected.clone()
    expected.jitter[:] = CENTRED
    for j in range(len(JITTER)):
        out = expected.clone()
        out.jitter[:] = j
        assert (scores_of((edits, source, expected), out)["sc"] == 10).all()


def test_deleting_objects_is_no_way_to_change_their_style():
    edited = sample_edits(torch.full((60,), KINDS.index("style-change")), generator(1))
    out = edited[2].clone()
    out.objects[:], out.colors[:] = EMPTY, 0
    assert (scores_of(edited, out)["sc"] == 0).all()


def test_added_object_may_stand_in_any_empty_cell():
    edited = sample_edits(torch.full((60,), KINDS.index("subject-add")), generator(1))
    _, source, expected = edited
    at = (source.objects != expected.objects).long().argmax(-1)
    row = torch.arange(60)
    cls, color = expected.objects[row, at], expected.colors[row, at]
    for cell in range(4):
        free = ~source.occupied[:, cell]
        out = source.clone()
        out.objects[:, cell], out.colors[:, cell] = cls, color
        sc = scores_of(edited, out)["sc"]
        assert (sc[free] == 10).all()
        assert (sc[~free] == 0).all()  # it took the place of another object
        twice = expected.clone()
        twice.objects[:, cell], twice.colors[:, cell] = cls, color
        assert (scores_of(edited, twice)["sc"][free & (at != cell)] == 7.5).all()
        wrong = expected.clone()
        wrong.colors[row, at] = (color + 1) % 6
        assert (scores_of(edited, wrong)["sc"] == 0).all()


def test_replacement_may_stand_anywhere_in_its_cell():
    edited = sample_edits(torch.full((60,), KINDS.index("subject-replace")), generator(1))
    edits, _, expected = edited
    target = torch.tensor([edit.target for edit in edits])
    for j in range(len(JITTER)):
        out = expected.clone()
        out.jitter[torch.arange(60), target] = j
        assert (scores_of(edited, out)["sc"] == 10).all()


def test_quality_falls_with_noise(edited):
    clean = render(edited[2])
    noise = 2 * torch.randn(clean.shape, generator=generator())
    qualities, overall = [], []
    for level in (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.4):
        scores = scores_of(edited, clean + level * noise)
        torch.testing.assert_close(scores["o"], (scores["sc"] * scores["pq"]).sqrt())
        qualities.append(scores["pq"])
        overall.append(scores["o"].mean())
    assert (qualities[0] == qualities[1]).all()  # invisible noise costs nothing
    for better, worse in pairwise(qualities[1:]):
        assert (worse < better).all()
    assert (qualities[-1] == 0).all()
    assert overall == sorted(overall, reverse=True)


@given(st.integers(0, 2**40), st.sampled_from(KINDS), st.floats(0, 1), st.booleans(), st.booleans())
def test_scores_lie_between_0_and_10(seed, kind, level, broken, held_out):
    g = generator(seed)
    split = "held_out" if held_out else "seen"
    edited = sample_edits(torch.full((8,), KINDS.index(kind)), g, split=split)
    out = edited[2].clone()
    mixed = torch.rand(8, 4, generator=g) < 0.4
    out.objects[mixed] = torch.randint(EMPTY + 1, (int(mixed.sum()),), generator=g)
    out.background[:2] = torch.randint(4, (2,), generator=g)
    images = render(out) + level * torch.randn(8, 3, 32, 32, generator=g)
    if broken:
        images[torch.rand(images.shape, generator=g) < 0.3] = float("nan")
    for score in scores_of(edited, images).values():
        assert torch.isfinite(score).all()
        assert score.min() >= 0
        assert score.max() <= 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_pictures(edited, value):
    """NaN reads as black, infinity as white (which is nearly snow): nothing is found in either."""
    images = torch.full((N, 3, 32, 32), value)
    scores = scores_of(edited, images)
    assert all(torch.isfinite(s).all() for s in scores.values())
    if value != float("inf"):
        assert (scores["sc"] == 0).all()
        assert (scores["o"] == 0).all()
        assert (scores["pq"] < 1).all()
    prompts, _ = sample_prompts(KIND, generator())
    seen = detect(images)
    assert not geneval_correct(prompts, seen).any()
    assert (style_share(seen, 0) == 0).all()


# Text to image


def correct_by_hand(prompt, objects, colors):
    """GenEval's rules on a list of four cells; diagonal neighbours count for both of their directions."""
    cells = list(zip(objects, colors, range(4), strict=True))

    def matching(cls, color):
        return [at for c, k, at in cells if c == cls and color in (0, k)]

    where = [matching(*item) for item in prompt.objects]
    if prompt.task == "counting":
        return len(where[0]) == prompt.count
    if prompt.task != "position":
        return all(where)
    axis = (lambda at: at % 2) if prompt.relation < 2 else (lambda at: at // 2)
    sign = 1 if prompt.relation in (0, 2) else -1
    return any(sign * axis(one) < sign * axis(two) for one in where[0] for two in where[1])


@pytest.mark.parametrize("task", TASKS)
def test_geneval_against_the_rules(task):
    """Pictures that are right or nearly so: cells shuffled, one overwritten."""
    n, g = 400, generator(4)
    prompts, scene = sample_prompts(torch.full((n,), TASKS.index(task)), g)
    order = torch.rand(n, 4, generator=g).argsort(-1)
    for part in ("objects", "colors", "jitter"):
        setattr(scene, part, getattr(scene, part).gather(1, order))
    over = torch.rand(n, 4, generator=g) < 0.2
    scene.objects = torch.where(over, scene.objects[:, :1], scene.objects)
    scene.colors = torch.where(torch.rand(n, 4, generator=g) < 0.2, 2, scene.colors)
    scene.colors[scene.objects == EMPTY] = 0
    answers = geneval_correct(prompts, detect(render(scene)))
    rows = zip(prompts, scene.objects.tolist(), scene.colors.tolist(), strict=True)
    assert answers.tolist() == [correct_by_hand(*row) for row in rows]
    assert 0.1 < answers.float().mean() < 1


@pytest.mark.parametrize("relation", range(4))
def test_swapping_the_objects_flips_the_relation(relation):
    opposite = (1, 0, 3, 2)[relation]
    prompts, scene = sample_prompts(torch.full((300,), TASKS.index("position")), generator(2))
    keep = torch.tensor([p.relation == relation for p in prompts])
    prompts, scene = [p for p in prompts if p.relation == relation], scene[keep]
    first = torch.tensor([p.objects[0][0] for p in prompts])[:, None]
    second = torch.tensor([p.objects[1][0] for p in prompts])[:, None]
    swapped = scene.clone()
    swapped.objects[scene.objects == first] = second.expand(-1, 4)[scene.objects == first]
    swapped.objects[scene.objects == second] = first.expand(-1, 4)[scene.objects == second]
    reverse = [Prompt(p.text, p.task, p.objects, 1, opposite) for p in prompts]
    across = [Prompt(p.text, p.task, p.objects, 1, (relation + 2) % 4) for p in prompts]
    seen, seen_swapped = detect(render(scene)), detect(render(swapped))
    assert len(prompts) > 20
    assert geneval_correct(prompts, seen).all()
    assert not geneval_correct(prompts, seen_swapped).any()
    assert geneval_correct(reverse, seen_swapped).all()
    assert not geneval_correct(reverse, seen).any()
    assert not geneval_correct(across, seen).any()
    assert RELATIONS[relation] != RELATIONS[opposite]


@pytest.mark.parametrize("wanted", [2, 3, 4])
def test_counting_wants_the_exact_number(wanted):
    scene = blank(5)
    for n in range(5):
        scene.objects[n, :n] = 1
    scene.objects[2:4, 3] = 6  # another object does not matter
    prompts = [Prompt("", "counting", ((1, 0),), wanted)] * 5
    assert geneval_correct(prompts, detect(render(scene))).tolist() == [n == wanted for n in range(5)]


@pytest.mark.parametrize(("color", "answers"), [(0, [True, True, True]), (1, [False, True, False])])
def test_natural_colour_is_asked_of_nobody(color, answers):
    scene = blank(3)
    scene.objects[:, 2], scene.colors[:, 2] = 5, torch.arange(3)
    prompts = [Prompt("", "single_object", ((5, color),))] * 3
    assert geneval_correct(prompts, detect(render(scene))).tolist() == answers


def test_doubtful_objects_do_not_count():
    """The same reading with a larger error than the confidence threshold allows."""
    prompts, scene = sample_prompts(torch.arange(6), generator())
    seen = detect(render(scene))
    for error, answer in ((0.139, True), (0.141, False)):
        doubtful = Detection(seen.scene, seen.style, torch.full_like(seen.error, error))
        assert (geneval_correct(prompts, doubtful) == answer).all()


def test_no_prompts():
    seen = detect(torch.zeros(0, 3, 32, 32))
    assert geneval_correct([], seen).dtype == torch.bool
    assert edit_scores([], blank(0), blank(0), seen)["sc"].shape == (0,)


def test_style_share():
    scene = blank(3)
    scene.objects[:, :] = torch.tensor([0, 1, 2, EMPTY])
    scene.objects[2] = EMPTY
    photo = render(scene)
    scene.style[:] = 1
    sketch = render(scene)
    left = torch.arange(32) < 16
    mixed = torch.where(left, photo, sketch)  # cells 0 and 2 are photos, 1 a sketch
    for images, share in ((photo, 0.0), (sketch, 1.0), (mixed, 1 / 3)):
        seen = detect(images)
        torch.testing.assert_close(style_share(seen, 1), torch.tensor([share, share, 0.0]))
        torch.testing.assert_close(style_share(seen, 0), torch.tensor([1 - share, 1 - share, 0.0]))
