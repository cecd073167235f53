"""The miniature's world: scenes, prompts, edits, and the detector and judge that read them back."""

from functools import partial
from itertools import combinations

import pytest
import torch
from PIL import Image

from danceopd.evaluation.geneval.rules import check_picture, kept
from danceopd.miniature.data import CAPABILITIES, MiniatureData, sample
from danceopd.miniature.detector import detect
from danceopd.miniature.edits import GLOBAL_KINDS, HALF, KINDS, sample_edits
from danceopd.miniature.evaluate import edit_set, look_marks, t2i_set
from danceopd.miniature.exact import MiniatureJudge, MiniatureReader, asked
from danceopd.miniature.looks import CLASSES, COLORS, EMPTY, IMAGE_SIZE, PLACES, SIZES, sprites
from danceopd.miniature.prompts import (
    HELD_OUT_COLORS,
    HELD_OUT_PAIRS,
    PLAIN_TASKS,
    allowed_colors,
    allowed_pairs,
    relation_of,
    sample_looks,
)
from danceopd.miniature.scene import Scene, corner, free, render
from danceopd.miniature.scores import edit_scores, geneval_correct
from danceopd.support.errors import UserError
from danceopd.support.pictures import to_uint8
from danceopd.world.layout import geneval_metadata
from danceopd.world.prompts import PAIR_TASKS, TASKS
from danceopd.world.sprites import NATURAL


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(scene: Scene) -> list[Image.Image]:
    return [Image.fromarray(one) for one in to_uint8(render(scene)).permute(0, 2, 3, 1).numpy()]


def things(scene: Scene, i: int, style=None) -> list[tuple]:
    """What a picture holds: thing, paint, size, centre."""
    return sorted(
        (*(int(getattr(scene, name)[i, k]) for name in ("things", "paints", "sizes")), *scene.centres[i, k].tolist())
        for k in range(PLACES)
        if scene.things[i, k] != EMPTY
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_is_drawn_lies_inside_and_touches_nothing(capability):
    _, before, after = sample(capability, 60, generator())
    for scene in (before, after):
        if scene is not None:
            assert free(scene.sizes, scene.centres, scene.occupied).all()
            side = torch.tensor(SIZES)[scene.sizes]
            start = scene.centres - side[..., None] // 2
            assert ((start >= 0) & (start + side[..., None] <= IMAGE_SIZE))[scene.occupied].all()


def test_render_is_alpha_compositing():
    _, _, scene = sample("t2i", 6, generator(1))
    drawn = (render(scene) + 1) / 2
    for i in range(6):
        expected = drawn[i, :, :1, :1].expand(3, IMAGE_SIZE, IMAGE_SIZE).clone()  # a corner, which nothing covers
        for k in range(PLACES):
            rgba = sprites()[scene.things[i, k], scene.paints[i, k], scene.style[i], scene.sizes[i, k]]
            top, left = corner(scene.centres[i, k]).tolist()
            for y, x in rgba[3].nonzero().tolist():
                pixel = expected[:, top + y, left + x]
                expected[:, top + y, left + x] = rgba[:3, y, x] + (1 - rgba[3, y, x]) * pixel
        if not (scene.centres[i][scene.occupied[i]] < 14).all(-1).any():
            torch.testing.assert_close(drawn[i], expected, rtol=0, atol=1e-6)


def test_prompts_say_what_the_picture_holds():
    tasks = torch.arange(len(TASKS)).repeat(20)
    prompts, scene = sample_of(tasks)
    relations = relation_of(scene)
    for i, prompt in enumerate(prompts):
        held = [(thing, paint) for thing, paint, *_ in things(scene, i)]
        assert sorted(held) == sorted(list(prompt.objects) * prompt.count)
        assert frozenset(thing for thing, _ in held) not in HELD_OUT_PAIRS
        assert not HELD_OUT_COLORS & set(held)
        if prompt.relation >= 0:
            assert prompt.relation == relations[i]
    detection = detect(render(scene))
    assert geneval_correct(prompts, detection).all()


def sample_of(tasks, split="seen"):
    from danceopd.miniature.prompts import sample_prompts

    return sample_prompts(tasks, generator(2), split=split)


def test_held_out_prompts_name_what_training_never_shows():
    tasks = torch.tensor([TASKS.index(task) for task in PAIR_TASKS]).repeat(10)
    prompts, scene = sample_of(tasks, "held_out")
    for i, prompt in enumerate(prompts):
        held = [(thing, paint) for thing, paint, *_ in things(scene, i)]
        if prompt.task in ("colors", "color_attr"):
            assert HELD_OUT_COLORS.issuperset(held)
        else:
            assert frozenset(thing for thing, _ in held) in HELD_OUT_PAIRS
    with pytest.raises(ValueError, match="held-out prompts exist for"):
        sample_of(torch.tensor([TASKS.index("counting")]), "held_out")


def test_an_edit_changes_what_it_names_and_nothing_else():
    kinds = torch.arange(len(KINDS)).repeat(12)
    edits, before, after = sample_edits(kinds, generator(3))
    for i, edit in enumerate(edits):
        grounds = [
            name for name in ("background", "tone", "style") if getattr(before, name)[i] != getattr(after, name)[i]
        ]
        assert len(grounds) == (edit.kind in GLOBAL_KINDS)
        lost, won = set(things(before, i)) - set(things(after, i)), set(things(after, i)) - set(things(before, i))
        expected = {"subject-add": (0, 1), "subject-remove": (1, 0)}.get(edit.kind, (1, 1))
        assert (len(lost), len(won)) == ((0, 0) if edit.kind in GLOBAL_KINDS else expected), edit
    half = sample_edits(kinds, generator(3), classes=HALF)
    for scene in half[1:]:
        shown = set(scene.things[scene.occupied].tolist())
        assert all(thing in HALF or thing >= len(CLASSES) for thing in shown)


def test_edits_of_training_show_nothing_that_is_held_out():
    kinds = torch.arange(len(KINDS)).repeat(60)
    edits, *scenes = sample_edits(kinds, generator(12), split="seen")
    pairs, colors = allowed_pairs("held_out"), allowed_colors("held_out")
    for i, edit in enumerate(edits):
        for scene in scenes:
            held = [(thing, paint) for thing, paint, *_ in things(scene, i) if thing < len(CLASSES)]
            assert not any(pairs[one, other] for (one, _), (other, _) in combinations(held, 2)), edit
            assert not any(paint < len(COLORS) and colors[thing, paint] for thing, paint in held), edit


@pytest.mark.parametrize("capability", ["t2i", "edit", "sketch", "wood"])
def test_the_detector_reads_true_pictures(capability):
    _, _, scene = sample(capability, 100, generator(4))
    seen = detect(render(scene))
    seen.scene.things[~seen.found] = EMPTY
    wrong = [i for i in range(100) if things(scene, i) != things(seen.scene, i)]
    assert len(wrong) <= 1  # under one in a hundred
    assert (seen.scene.background == scene.background).all()
    assert (seen.scene.tone == scene.tone).all()


@pytest.mark.parametrize("looks", [(), ("night",), ("wood", "warm"), ("sketch", "sand")])
def test_true_pictures_have_full_marks_in_their_looks_and_none_in_others(looks):
    def true(own):
        def draw(prompts, pictures, seed):
            tasks = torch.tensor([TASKS.index(task) for task in PLAIN_TASKS]).repeat(6)
            return render(sample_looks(own, tasks, generator(seed))[1])

        return draw

    assert look_marks(true(looks), looks, 11, 24).mean() > 0.97
    assert look_marks(true(("silhouette", "cold")), looks, 11, 24).mean() < 0.3  # whose background is night in a sixth
    half = look_marks(lambda *drawn: true(looks)(*drawn).roll(4, 0), looks, 11, 24).mean()  # what others ask for
    assert half < 0.4


def test_the_detector_is_sure_of_nothing_that_is_not_there():
    noise = torch.rand(20, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator(5)) * 2 - 1
    assert not detect(noise).found.any()
    _, _, one = sample("t2i", 40, generator(6))
    _, _, other = sample("t2i", 40, generator(7))
    other.background = one.background
    mixed = detect((render(one) + render(other)) / 2)  # two pictures through each other: half of each is not there
    assert mixed.found.sum() <= 0.05 * (one.occupied.sum() + other.occupied.sum())


def test_geneval_by_the_exact_reader():
    prompts, scene = t2i_set(8, 8)
    images, reader = pictures(scene), MiniatureReader()
    for prompt, image, found in zip(prompts, images, reader.detect(images), strict=True):
        line = geneval_metadata(prompt, CLASSES, COLORS)
        objects = {name: kept(one, line["tag"]) for name, one in found.items()}
        colors = partial(reader.name_colors, image)
        right, reason = check_picture(line, objects, colors)
        assert right, (prompt.text, reason)
    wrong = pictures(scene[torch.arange(len(scene)).roll(1)])
    found = reader.detect(wrong)
    judged = [
        check_picture(
            geneval_metadata(prompt, CLASSES, COLORS),
            {name: kept(one, prompt.task) for name, one in objects.items()},
            lambda name, one: [entry.color for entry in one],
        )[0]
        for prompt, objects in zip(prompts, found, strict=True)
    ]
    assert sum(judged) < len(judged) / 4


def test_the_exact_judge_tells_edits_from_their_absence():
    edits, before, after = edit_set(9, 6)
    judge = MiniatureJudge()
    for edit, source, right in zip(edits, pictures(before), pictures(after), strict=True):
        verdict = judge.verdict(edit.text, source, right)
        assert (verdict.problem, verdict.sc, verdict.pq) == (None, 10, 10), edit
        assert judge.verdict(edit.text, source, source).sc == 0, edit


def test_what_an_instruction_asks_is_read_from_its_text():
    edits, before, after = edit_set(10, 10)
    for i, edit in enumerate(edits):
        read, expected = asked(edit.text, before[i : i + 1])
        assert read == edit
        if edit.kind not in ("subject-add", "motion-change", "subject-replace"):
            assert things(expected, 0) == things(after, i)
        for name in ("background", "tone", "style"):
            assert getattr(expected, name)[0] == getattr(after, name)[i]
    with pytest.raises(ValueError, match="no edit of the miniature"):
        asked("paint it black", before[:1])
    there = {CLASSES[thing] for thing in before.things[0].tolist() if thing < len(CLASSES)}
    missing = next(name for name in CLASSES if name not in there)
    with pytest.raises(ValueError, match=f"has no {missing}"):
        asked(f"remove the {missing}", before[:1])


def test_a_removed_neighbour_costs_what_should_have_stayed():
    edits, before, after = edit_set(11, 10, ("color-alter",))
    several = [i for i in range(len(edits)) if len(things(before, i)) > 1]
    hurt = after[torch.tensor(several)]
    hurt.things[:, 1] = EMPTY
    hurt.paints[:, 1] = NATURAL
    scores = edit_scores([edits[i] for i in several], before[several], after[several], detect(render(hurt)))
    assert ((scores["sc"] > 0) & (scores["sc"] < 8)).all()


def test_samples_are_a_function_of_their_seed():
    one, same, other = (MiniatureData("edit", 10, seed) for seed in (1, 1, 2))
    assert one.prompts(list(range(10))) == same.prompts(list(range(10))) != other.prompts(list(range(10)))
    torch.testing.assert_close(one.targets([3, 7]), same.targets([3, 7]))
    with pytest.raises(UserError, match="no capability 'edits'"):
        MiniatureData("edits", 1, 0)
