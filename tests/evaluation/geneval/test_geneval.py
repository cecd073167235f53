"""GenEval: its rules on hand-made detections and by law, its files, what looks at pictures, and what draws them."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_flux
import tiny_geneval as tiny
import tiny_qwen_image
import tiny_sd3
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from danceopd.cli.parser import main
from danceopd.evaluation.geneval import models as geneval_models
from danceopd.evaluation.geneval.draw import Drawing, draw_pictures, sample_seed
from danceopd.evaluation.geneval.layout import check_metadata, read_metadata, read_pictures, read_results
from danceopd.evaluation.geneval.models import crop, detector_input, load_colors, load_detector, objects_of
from danceopd.evaluation.geneval.rules import (
    CLASSES,
    COLORS,
    MAX_OBJECTS,
    RELATIONS,
    Found,
    check_picture,
    kept,
    relations,
)
from danceopd.evaluation.geneval.summary import summary
from danceopd.support.errors import UserError
from danceopd.support.ranks import Ranks

# ------------------------------------------------------------------------------------------------- the rules


def box(x, y, width=10, height=10):
    return (float(x), float(y), float(x + width), float(y + height))


def found(*boxes, confidence=0.95):
    """Detections, each a little less confident than the one before."""
    return [Found(one, confidence - 0.001 * place) for place, one in enumerate(boxes)]


def no_colors(name, objects):
    raise AssertionError("no colour was asked")


def verdict(objects, *include, exclude=(), colors_of=no_colors):
    return check_picture({"include": list(include), "exclude": list(exclude)}, objects, colors_of)[0]


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize(
    ("tag", "confidence", "counts"),
    [
        ("single_object", 0.3, False),
        ("single_object", 0.3001, True),
        ("color_attr", 0.9, True),
        ("counting", 0.3001, False),
        ("counting", 0.9, False),
        ("counting", 0.9001, True),
    ],
)
def test_a_detection_counts_above_the_confidence_of_its_tag(tag, confidence, counts):
    assert bool(kept([Found(box(0, 0), confidence)], tag)) is counts


def test_sixteen_objects_of_a_class_count_and_they_are_the_most_confident():
    many = [Found(box(i, 0), 0.5 + 0.01 * i) for i in range(MAX_OBJECTS + 1)]
    assert kept(many, "two_object") == many[:0:-1]
    assert len(kept(many[1:], "two_object")) == MAX_OBJECTS


def test_overlapping_boxes_are_all_kept_unless_a_limit_is_given():
    # 9 of 11 x 11 pixels' columns are shared by boxes two apart: 99 of 143 pixels
    first, second, third = found(box(0, 0), box(2, 0), box(40, 0))
    assert kept([first, first, second], "colors") == [first, first, second]
    share = 99 / 143
    assert kept([first, second, third], "colors", share + 1e-6) == [first, second, third]
    assert kept([first, second, third], "colors", share) == [first, third]
    assert kept([second, first], "colors", 0.1) == [first]


def test_an_include_needs_its_count_and_all_includes_must_hold():
    dogs = {"dog": found(box(0, 0), box(20, 0))}
    assert verdict(dogs, clause("dog", 2))
    assert not verdict(dogs, clause("dog", 3))
    assert not verdict(dogs, clause("dog"), clause("cat"))
    assert verdict(dogs | {"cat": found(box(0, 0))}, clause("dog"), clause("cat"))
    assert not verdict({}, clause("dog"))


def test_an_exclude_fails_at_its_count():
    dogs = {"dog": found(box(0, 0), box(20, 0))}
    assert verdict(dogs, clause("dog", 2), exclude=[clause("dog", 3)])
    assert not verdict(dogs, clause("dog", 1), exclude=[clause("dog", 2)])
    assert not verdict(dogs, clause("dog", 1), exclude=[clause("cat", 1), clause("dog", 1)])
    assert verdict(dogs, clause("dog", 1), exclude=[clause("cat", 1)])


def test_colors_are_of_the_most_confident_objects_alone():
    cups = {"cup": found(box(0, 0), box(20, 0), box(40, 0))}
    asked = []

    def colors_of(name, objects):
        asked.append((name, len(objects)))
        return ["red" if one.box[0] < 30 else "blue" for one in objects]

    assert verdict(cups, clause("cup", 2, color="red"), colors_of=colors_of)
    assert not verdict(cups, clause("cup", 3, color="red"), colors_of=colors_of)
    assert not verdict(cups, clause("cup", 1, color="blue"), colors_of=colors_of), "the blue one is third"
    assert not verdict(cups, clause("cup", 4, color="red"), colors_of=colors_of)
    assert asked == [("cup", 2), ("cup", 3), ("cup", 1)], "too few objects are not looked at"


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        # Both boxes are 10 x 10: 2 pixels are taken off each axis.
        ((-4.0, 0), []),  # (4 - 2) / 4 is not beyond a half
        ((-4.01, 0), ["left of"]),
        ((4.0, 0), []),
        ((4.01, 0), ["right of"]),
        ((0, -4.0), []),
        ((0, -4.01), ["above"]),
        ((0, 4.0), []),
        ((0, 4.01), ["below"]),
        ((0, 0), []),
        ((2.0, 2.0), []),
        ((100, 100), ["right of", "below"]),  # 98 / 141 on both
        ((-100, 100), ["left of", "below"]),
        ((100, -50), ["right of"]),  # 48 / 112 is not
        ((100, -66), ["right of", "above"]),  # 64 / 120
        ((100, -60), ["right of"]),  # 58 / 117
    ],
)
def test_a_relation_is_beyond_half_of_the_distance_after_a_tenth_of_the_sizes_is_taken_off(offset, expected):
    assert relations(box(200 + offset[0], 200 + offset[1]), box(200, 200)) == expected


def test_larger_objects_must_be_further_apart():
    assert relations(box(0, 0, 10, 10), box(15, 0, 10, 10)) == ["left of"]
    assert relations(box(-20, 0, 50, 10), box(-5, 0, 50, 10)) == []


def test_a_position_is_to_an_earlier_clause_which_must_have_held():
    near, far = box(0, 0), box(100, 0)
    right_of = clause("cat", position=["right of", 0])
    assert verdict({"dog": found(near), "cat": found(far)}, clause("dog"), right_of)
    assert not verdict({"dog": found(far), "cat": found(near)}, clause("dog"), right_of)
    assert not verdict({"cat": found(far)}, clause("dog"), right_of), "no target"
    red = clause("dog", color="red")
    placed = {"dog": found(near), "cat": found(far)}
    assert not verdict(placed, red, right_of, colors_of=lambda name, objects: ["blue"]), "a target that did not hold"
    objects = {"dog": found(far), "cup": found(near), "cat": found(box(50, 0))}
    assert verdict(objects, clause("dog"), clause("cup"), clause("cat", position=["right of", 1]))
    assert not verdict(objects, clause("dog"), clause("cup"), clause("cat", position=["right of", 0]))


def test_all_objects_of_a_clause_stand_in_the_relation_to_all_of_the_other():
    dogs, cats = found(box(0, 0), box(10, 0)), found(box(100, 0), box(-100, 0))
    assert verdict({"dog": dogs, "cat": cats}, clause("dog", 2), clause("cat", 1, position=["right of", 0]))
    assert not verdict({"dog": dogs, "cat": cats}, clause("dog", 2), clause("cat", 2, position=["right of", 0]))
    dogs = found(box(0, 0), box(200, 0))
    assert verdict({"dog": dogs, "cat": cats}, clause("dog", 1), clause("cat", 1, position=["right of", 0]))
    assert not verdict({"dog": dogs, "cat": cats}, clause("dog", 2), clause("cat", 1, position=["right of", 0]))


def test_the_reason_names_everything_that_is_wrong():
    objects = {"dog": found(box(0, 0)), "cat": found(box(100, 0))}
    metadata = {
        "include": [clause("dog", 2), clause("cat", position=["left of", 0]), clause("cup", color="red")],
        "exclude": [clause("dog", 1)],
    }
    correct, reason = check_picture(metadata, objects, no_colors)
    assert not correct
    assert [text.split(":")[0] for text in reason.splitlines()] == ["dog", "cat", "cup", "dog"]
    assert check_picture({"include": [clause("dog")]}, objects, no_colors) == (True, "")


NAMES = ("dog", "cat", "cup")
boxes = st.builds(box, *[st.integers(0, 200)] * 2, *[st.integers(1, 80)] * 2)
detections = st.lists(st.builds(Found, boxes, st.floats(0.01, 1.0)), max_size=5)
scenes = st.fixed_dictionaries(dict.fromkeys(NAMES, detections))


@st.composite
def prompts(draw):
    include = []
    for place in range(draw(st.integers(1, 3))):
        one = clause(draw(st.sampled_from(NAMES)), draw(st.integers(1, 2)))
        if draw(st.booleans()):
            one["color"] = draw(st.sampled_from(("red", "blue")))
        if place and draw(st.booleans()):
            one["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, place - 1))]
        include.append(one)
    return include


def by_place(name, objects):
    """A colour that is the object's own."""
    return ["red" if one.box[0] < 100 else "blue" for one in objects]


def seen(scene, tag="colors"):
    return {name: kept(objects, tag) for name, objects in scene.items()}


@given(scenes, st.sampled_from(("colors", "counting")))
def test_what_is_kept_is_sorted_and_sure_and_stays(scene, tag):
    for objects in seen(scene, tag).values():
        confidences = [one.confidence for one in objects]
        assert confidences == sorted(confidences, reverse=True)
        assert all(confidence > (0.9 if tag == "counting" else 0.3) for confidence in confidences)
        assert kept(objects, tag) == objects


@given(scenes, prompts())
def test_more_confident_detections_never_break_an_include(scene, include):
    """Confidences rise in the same order: what was found stays first, and less confident objects may join behind."""
    surer = {name: [Found(one.box, one.confidence**0.5) for one in objects] for name, objects in scene.items()}
    if verdict(seen(scene), *include, colors_of=by_place):
        assert verdict(seen(surer), *include, colors_of=by_place)


@given(scenes, detections, st.sampled_from(NAMES), prompts())
def test_another_object_never_breaks_an_include_of_counts(scene, more, name, include):
    include = [clause(one["class"], one["count"]) for one in include]
    if verdict(seen(scene), *include):
        assert verdict(seen(scene | {name: scene[name] + more}), *include)


@given(scenes, prompts(), st.sampled_from(NAMES))
def test_adding_an_excluded_object_always_fails(scene, include, name):
    number = len(seen(scene)[name])
    excluded = [clause(name, number + 1)]
    before = verdict(seen(scene), *include, colors_of=by_place)
    assert verdict(seen(scene), *include, exclude=excluded, colors_of=by_place) == before
    one_more = scene | {name: [*scene[name], Found(box(5, 5), 0.31)]}
    assert not verdict(seen(one_more), *include, exclude=excluded, colors_of=by_place)


@given(scenes, prompts())
def test_a_clause_said_twice_changes_nothing(scene, include):
    twice = [*include, *(one for one in include)]
    assert verdict(seen(scene), *twice, colors_of=by_place) == verdict(seen(scene), *include, colors_of=by_place)


@given(boxes, boxes, st.integers(-3, 6), st.integers(-500, 500))
def test_relations_are_mutual_and_depend_on_neither_scale_nor_place(a, b, power, shift):
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    there = relations(a, b)
    assert {opposite[name] for name in there} == set(relations(b, a))
    assert not {"left of", "right of"} <= set(there)
    assert not {"above", "below"} <= set(there)
    if power >= 0:
        assert relations(*([2.0**power * x for x in one] for one in (a, b))) == there
    assert relations(*([x + shift for x in one] for one in (a, b))) == there


# ------------------------------------------------------------------------------------------------- its files


def test_the_benchmarks_own_lines_are_read(tmp_path):
    lines = [
        tiny.line(),
        tiny.line("four dogs", "counting", clause("dog", 4), exclude=[clause("dog", 5)]),
        tiny.line("x", "position", clause("tv remote"), clause("computer mouse", position=["below", 0])),
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_metadata(tmp_path / "m.jsonl") == lines
    assert len(set(CLASSES)) == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: [m], "not a JSON object"),
        (lambda m: {**m, "tag": 3}, "'tag' must be a text"),
        (lambda m: {"tag": "x", "prompt": "y", "includes": m["include"]}, "no 'include'; did you mean 'includes'"),
        (lambda m: {**m, "include": []}, "asks for nothing"),
        (lambda m: {**m, "include": {"class": "dog"}}, "must be a list"),
        (lambda m: {**m, "include": [{"class": "dog"}]}, "needs a count"),
        (lambda m: {**m, "include": [clause("dog", True)]}, "needs a count"),
        (lambda m: {**m, "include": [clause("dog", 0)]}, "needs a count"),
        (lambda m: {**m, "include": [clause("dgo")]}, "did you mean 'dog'"),
        (lambda m: {**m, "include": [clause("unicorn")]}, "the classes are COCO's"),
        (lambda m: {**m, "include": [clause("dog", colour="red")]}, "unknown key 'colour'"),
        (lambda m: {**m, "include": [clause("dog", color="grey")]}, "the colour 'grey'"),
        (lambda m: {**m, "include": [clause("dog", position=["left of", 0])]}, "an earlier clause"),
        (lambda m: {**m, "include": [clause("dog"), clause("cat", position=["left", 0])]}, "an earlier clause"),
        (lambda m: {**m, "exclude": [clause("dog", color="red")]}, "unknown key 'color'"),
    ],
)
def test_wrong_metadata_is_said_with_its_line(tmp_path, change, message):
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(tiny.line())}\n{json.dumps(change(tiny.line()))}\n")
    with pytest.raises(UserError, match=r"m\.jsonl:2: ") as caught:
        read_metadata(tmp_path / "m.jsonl")
    assert message in str(caught.value)


def test_files_that_are_no_metadata_are_said(tmp_path):
    for text, message in (("{", r":1: not JSON, or torn"), ("\n", "is empty")):
        (tmp_path / "m.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            read_metadata(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_metadata(tmp_path / "m.jsonl")
    with pytest.raises(UserError, match="there is no file"):
        read_metadata(tmp_path / "other.jsonl")


@pytest.mark.parametrize("name", ["{:04d}.png", "{:05d}.png", "{}.png"])
def test_a_folder_of_any_tool_is_read(tmp_path, name):
    metadata = [tiny.line(f"prompt {i}") for i in range(2)]
    folder = tiny.save_pictures(tmp_path / "out", metadata, samples=11, name=name)
    (folder / "00000" / "grid.png").write_bytes(b"")
    (folder / "00000" / "samples" / "notes.txt").write_text("")
    (folder / "logs").mkdir()
    drawn = read_pictures(folder, metadata)
    assert [one.metadata for one in drawn] == metadata
    assert [list(one.pictures) for one in drawn] == [list(range(11))] * 2
    assert all(path.name == name.format(number) for number, path in drawn[0].pictures.items())


def test_what_a_folder_lacks_is_said_before_anything_is_scored(tmp_path):
    metadata = [tiny.line(f"prompt {i}") for i in range(3)]
    folder = tiny.save_pictures(tmp_path / "out", metadata)

    def refuses(message, *args):
        with pytest.raises(UserError, match=message):
            read_pictures(folder, *args)

    refuses("lacks 00003 of 4 prompts", [*metadata, tiny.line("prompt 3")])
    refuses("00001 are not prompts of the metadata", [metadata[0], tiny.line("other"), metadata[2]])
    refuses("00000, 00001, 00002 lack pictures", metadata, 3)
    truncated = folder / "00001" / "samples" / "0001.png"
    truncated.write_bytes(truncated.read_bytes()[:-20])
    refuses(r"damaged pictures: .*00001.samples.0001\.png")
    truncated.unlink()
    tiny.picture(0).save(folder / "00001" / "samples" / "00000.png")
    refuses("pictures of the same number")
    shutil.rmtree(folder / "00001" / "samples")
    refuses("00001 lack pictures")
    (folder / "00001" / "metadata.jsonl").write_text(json.dumps(metadata[1]) * 2)
    refuses("00001.metadata.jsonl:1: not JSON, or torn")
    (folder / "00001" / "metadata.jsonl").unlink()
    refuses("there is no file .*00001.metadata.jsonl")
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match=r"there is no folder|holds no pictures in GenEval"):
            read_pictures(missing)


def as_results(path, lines):
    path.write_text("".join(json.dumps(one).replace("/", "\\/") + "\n" for one in lines))  # as pandas writes them
    return path


def result(tag="colors", correct=True, prompt="p", number=0):
    return {
        "filename": f"out/00000/samples/{number:04d}.png",
        "tag": tag,
        "prompt": prompt,
        "correct": correct,
        "reason": "",
        "metadata": json.dumps({"tag": tag, "prompt": prompt}),
        "details": "{}",
    }


def test_results_of_the_original_tool_are_summed_up_as_it_does(tmp_path, capsys):
    lines = [result("b", True, "p"), result("b", False, "p", 1), result("b", False, "q"), result("b", False, "q", 1)]
    lines += [result("a", True, "p")]
    scores = summary(read_results(as_results(tmp_path / "r.jsonl", lines)))
    assert scores["overall"] == (0.25 + 1) / 2
    assert list(scores["tags"]) == ["b", "a"]
    assert scores["tags"]["b"] == {"score": 0.25, "correct": 1, "pictures": 4}
    assert (scores["correct_pictures"], scores["correct_prompts"]) == (2 / 5, 2 / 3)
    assert (scores["pictures"], scores["prompts"]) == (5, 3)
    assert main(["evaluate", "geneval", "--results", str(tmp_path / "r.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "0.62500" in printed
    assert "1 of 4" in printed


def test_lines_that_are_no_results_are_said(tmp_path):
    for wrong in ({"tag": "x"}, {**result(), "correct": 1}, {**result(), "metadata": {}}, [1]):
        with pytest.raises(UserError, match=r"r\.jsonl:2: no "):
            read_results(as_results(tmp_path / "r.jsonl", [result(), wrong]))


# ------------------------------------------------------------------------------------------------- its models


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluators")
    return tiny.save_detector(root / "mask2former"), tiny.save_clip(root / "clip")


@pytest.fixture
def small(monkeypatch):
    """Detectors see small pictures: at 800 pixels a test takes seconds."""
    monkeypatch.setattr(geneval_models, "SHORT", 96)
    monkeypatch.setattr(geneval_models, "LONG", 160)


def alike(a, b):
    return (
        a.keys() == b.keys()
        and all([one.box for one in a[name]] == [one.box for one in b[name]] for name in a)
        and all(
            np.array_equal(one.mask, other.mask) and one.confidence == pytest.approx(other.confidence, abs=1e-4)
            for name in a
            for one, other in zip(a[name], b[name], strict=True)
        )
    )


def test_the_detector_finds_the_same_in_a_batch_as_alone(evaluators, small):
    detect = load_detector(evaluators[0], "cpu", {"dog"})
    pictures = [tiny.picture(0), tiny.picture(1), tiny.picture(2, 120, 80), tiny.picture(3)]
    together = detect(pictures)
    assert all(alike(a, detect([p])[0]) for a, p in zip(together, pictures, strict=True))
    assert sum(len(objects) for one in together for objects in one.values()) >= 4
    assert not alike(together[0], together[1]), "a picture does not matter"
    for one, picture in zip(together, pictures, strict=True):
        for name, objects in one.items():
            assert name in CLASSES
            for there in objects:
                x0, y0, x1, y1 = (int(x) for x in there.box)
                assert there.mask.shape == picture.size[::-1]
                outside = there.mask.copy()
                outside[y0:y1, x0:x1] = False
                assert not outside.any()
                assert there.mask[y0].any()
                assert there.mask[y1 - 1].any()
                assert 0.3 < there.confidence <= 1


def test_a_picture_is_fitted_to_800_by_1333_and_filled_up_with_grey():
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (tiny.MEAN, tiny.STD))
    for (width, height), size, padded in (
        ((1024, 1024), (800, 800), (800, 800)),
        ((100, 200), (1333, 667), (1344, 672)),
        ((640, 480), (800, 1067), (800, 1088)),
    ):
        pixels, inside = detector_input([tiny.picture(0, width, height)], mean, std, "cpu")
        assert (inside, tuple(pixels.shape)) == (size, (1, 3, *padded))
        grey = (128 / 255 - mean) / std
        assert torch.allclose(pixels[0, :, size[0] :], grey.expand(3, padded[0] - size[0], padded[1]))
        assert torch.allclose(pixels[0, :, :, size[1] :], grey.expand(3, padded[0], padded[1] - size[1]))
    whole = tiny.picture(1, 800, 800)  # of its size already: the pixels themselves
    pixels, _ = detector_input([whole], mean, std, "cpu")
    assert torch.equal((pixels[0] * std + mean).mul(255).round().permute(1, 2, 0).byte(), torch.tensor(np.array(whole)))


def logits(*rows):
    """[Q, 3]: class probabilities of two classes and of none."""
    return torch.log(torch.tensor(rows))


def test_detections_come_from_logits_as_mask2former_infers_them():
    labels, size = ["dog", "curtain"], (8, 8)
    masks = torch.full((3, 8, 8), -4.0)
    masks[0, 2:5, 1:4] = 3.0
    masks[0, 7, 7] = 1e-4  # barely positive counts
    masks[1, :, :] = 2.0
    masks[2, 0, 0] = 9.0
    objects = objects_of(logits([0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.25, 0.1, 0.65]), masks, size, size, size, labels)
    assert objects.keys() == {"dog"}, "what COCO calls stuff, and what is unlikely, is left out"
    (one,) = objects["dog"]
    assert one.box == (1, 2, 8, 8)
    assert one.mask.sum() == 10
    inside = torch.tensor([3.0] * 9 + [1e-4]).sigmoid().mean()
    assert one.confidence == pytest.approx(0.8 * float(inside), abs=1e-5)


@pytest.mark.parametrize(("probability", "there"), [(0.299, False), (0.301, True)])
def test_the_class_times_the_mask_must_be_above_the_confidence(probability, there):
    sure, unsure = torch.full((1, 4, 4), 50.0), torch.full((1, 4, 4), 1e-3)
    row = logits([probability, 0.0, 1 - probability])
    args = ((4, 4), (4, 4), (4, 4), ["dog", "cat"])
    assert bool(objects_of(row, sure, *args)) is there
    assert not objects_of(row, unsure, *args), "its mask is half sure"
    assert not objects_of(logits([0.9, 0.0, 0.1]), -sure, *args), "no pixel is its"


def test_one_query_may_be_two_objects_and_padding_is_cut_off():
    mask = torch.full((1, 8, 8), -5.0)
    mask[:, :, 4:] = 5.0
    objects = objects_of(logits([0.48, 0.47, 0.05]), mask, (8, 8), (8, 6), (16, 12), ["dog", "cat"])
    assert {name: one[0].box for name, one in objects.items()} == {"dog": (8, 0, 12, 16), "cat": (8, 0, 12, 16)}


def test_other_names_of_cocos_classes_are_known(tmp_path):
    named = {v: k for k, v in geneval_models.NAMES.items()}
    folder = tiny.save_detector(tmp_path / "d", [named.get(name, name) for name in CLASSES])
    (found,) = load_detector(folder, "cpu", set(CLASSES))([Image.new("RGB", (32, 32))])
    assert found.keys() <= set(CLASSES)


def test_folders_that_are_no_detector_are_said(tmp_path, evaluators):
    with pytest.raises(UserError, match="there is no folder"):
        load_detector(tmp_path / "nothing", "cpu", {"dog"})
    with pytest.raises(UserError, match="no Mask2Former"):
        load_detector(evaluators[1], "cpu", {"dog"})
    other = tiny.save_detector(tmp_path / "ade", [f"wall {i}" for i in range(80)])
    with pytest.raises(UserError, match=r"does not know dog, tv remote: its id2label begins wall 0.*COCO"):
        load_detector(other, "cpu", {"dog", "tv remote"})
    coco = tmp_path / "coco"
    shutil.copytree(evaluators[0], coco)
    (coco / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="no image_mean"):
        load_detector(coco, "cpu", {"dog"})
    with pytest.raises(UserError, match="is no CLIP"):
        load_colors(evaluators[0], "cpu")
    clip = shutil.copytree(evaluators[1], tmp_path / "clip")
    torch.save({}, clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_colors(clip, "cpu")


def test_the_background_of_an_object_is_painted_and_its_box_cut_out():
    picture, mask = Image.new("RGB", (20, 10), "#f00"), np.zeros((10, 20), bool)
    mask[2:6, 3:9] = True
    mask[2, 3] = False
    cut = crop(picture, Found((3.0, 2.0, 9.0, 6.0), 0.9, mask))
    assert cut.size == (6, 4)
    assert cut.getpixel((0, 0)) == (153, 153, 153)
    assert cut.getpixel((1, 0)) == (255, 0, 0)
    assert crop(picture, Found((3.0, 2.0, 9.0, 6.0), 0.9)).getpixel((0, 0)) == (255, 0, 0)


def test_colors_are_the_nearest_mean_of_three_prompts_in_a_batch_as_alone(evaluators):
    name_colors = load_colors(evaluators[1], "cpu")
    picture, objects = tiny.picture(5), found(*(box(4 * i, 2 * i, 12, 20) for i in range(18)))
    together = name_colors(picture, "cup", objects)
    assert together == [name_colors(picture, "cup", [one])[0] for one in objects]
    assert len(set(together)) > 1
    # By the whole model, a prompt at a time.
    model, tokenizer = CLIPModel.from_pretrained(evaluators[1]), AutoTokenizer.from_pretrained(evaluators[1])
    shown = np.asarray(crop(picture, objects[3]).resize((32, 53), Image.BICUBIC))[10:42] / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    pixels = torch.tensor((shown - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    scores = {}
    for color in COLORS:
        texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"]
        with torch.no_grad():
            out = [model(**tokenizer(text, return_tensors="pt"), pixel_values=pixels) for text in texts]
        direction = torch.cat([one.text_embeds for one in out]).mean(0)  # of unit length each
        scores[color] = float(out[0].image_embeds[0] @ direction / direction.norm())
    assert together[3] == max(scores, key=scores.get)


# ------------------------------------------------------------------------------------------------- its pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd3.save_tiny(tmp_path_factory.mktemp("sd3") / "model")


def how(model, **more):
    return Drawing(model, num_inference_steps=2, resolution=32, dtype=torch.float32, **more)


METADATA = [tiny.line("a photo of a dog"), tiny.line("a photo of a cat", "single_object", clause("cat"))]


def pixels(folder):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in folder.rglob("*.png")}


def close(a, b, levels=1):
    return a.keys() == b.keys() and all(np.abs(a[name] - b[name]).max() <= levels for name in a)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Pictures that were drawn in one go, two at a time."""
    folder = tmp_path_factory.mktemp("whole")
    assert draw_pictures(METADATA, folder, how(model, samples=4, batch_size=2)) == 8
    return folder


def of_samples(drawn, number):
    return {name: value for name, value in drawn.items() if int(name[-8:-4]) < number}


def test_pictures_are_drawn_in_the_layout_whatever_the_batch_and_again_only_where_one_is_missing(
    tmp_path, model, whole
):
    folder = shutil.copytree(whole, tmp_path / "out")
    drawn = read_pictures(folder, METADATA, 4)
    assert [p.name for p in drawn[0].pictures.values()] == [f"{i:04d}.png" for i in range(4)]
    whole = pixels(whole)
    values = [value.tobytes() for value in whole.values()]
    assert len(set(values)) == 8, "pictures share their noise"
    assert draw_pictures(METADATA, folder, how(model)) == 0
    (folder / "00001" / "samples" / "0002.png").unlink()
    assert draw_pictures(METADATA, folder, how(model, batch_size=1)) == 1
    assert close(pixels(folder), whole)
    assert draw_pictures(METADATA[:1], tmp_path / "four", how(model)) == 4
    assert close(pixels(tmp_path / "four"), {name: value for name, value in whole.items() if name < "00001"})
    assert draw_pictures(METADATA, tmp_path / "seed", how(model, seed=1, samples=1)) == 2
    assert not close(pixels(tmp_path / "seed"), of_samples(whole, 1), 8)


class Part(Ranks):
    """One of several ranks, the others of which nothing is heard from."""

    def gather(self, value):
        return [value]


def test_pictures_are_the_same_whichever_rank_draws_them(tmp_path, model, whole):
    for rank in (0, 1):
        assert draw_pictures(METADATA, tmp_path / "ranks", how(model, samples=2), Part(rank, 2)) == 2
    assert close(pixels(tmp_path / "ranks"), of_samples(pixels(whole), 2), 0)


def test_a_run_that_is_stopped_goes_on(tmp_path, model, whole):
    def stopped(items):
        yield items[0]
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        draw_pictures(METADATA, folder, how(model, samples=2), progress=stopped)
    assert len(pixels(folder)) == 2
    assert draw_pictures(METADATA, folder, how(model, samples=2)) == 2
    assert close(pixels(folder), of_samples(pixels(whole), 2), 0)
    assert not list(folder.rglob("*.tmp"))


def test_a_folder_is_not_mixed(tmp_path, model):
    folder, one = tmp_path / "out", how(model, samples=1)
    draw_pictures(METADATA, folder, one)
    with pytest.raises(UserError, match=r"drawn with another seed, guidance_scale; draw into"):
        draw_pictures(METADATA, folder, how(model, samples=1, seed=3, guidance_scale=2.0))
    with pytest.raises(UserError, match=r"00001.metadata\.jsonl is not line 2"):
        draw_pictures(METADATA[:1], folder, one)
    (folder / "generation.json").write_text("{")
    with pytest.raises(UserError, match=r"generation\.json is damaged"):
        draw_pictures(METADATA, folder, one)
    (folder / "generation.json").unlink()
    with pytest.raises(UserError, match="another tool drew"):
        draw_pictures(METADATA, folder, one)
    with pytest.raises(UserError, match="there is nothing at"):
        draw_pictures(METADATA, tmp_path / "new", how(model, lora=tmp_path / "missing"))
    assert not (tmp_path / "new").exists()


def test_an_exported_adapter_is_drawn_with_as_diffusers_does(tmp_path, model):
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    pipeline.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(0)
    state = {k.replace(".default", ""): v for k, v in pipeline.transformer.state_dict().items() if "lora_" in k}
    state = {key: torch.randn(value.shape, generator=generator) for key, value in state.items()}
    pipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
    one = how(model, samples=1, lora=tmp_path / "lora", guidance_scale=3.0)
    draw_pictures(METADATA[:1], tmp_path / "with", one)
    draw_pictures(METADATA[:1], tmp_path / "without", how(model, samples=1, guidance_scale=3.0))
    plain = StableDiffusion3Pipeline.from_pretrained(model)
    plain.load_lora_weights(tmp_path / "lora")
    noise = torch.Generator().manual_seed(sample_seed(0, 0, 0))
    expected = plain(
        METADATA[0]["prompt"], height=32, width=32, num_inference_steps=2, guidance_scale=3.0, generator=noise
    ).images[0]
    expected = {"00000/samples/0000.png": np.asarray(expected).astype(int)}
    assert close(pixels(tmp_path / "with"), expected)
    assert not close(pixels(tmp_path / "without"), expected, 2)
    # A whole transformer instead, as export --merge writes it.
    plain.fuse_lora()
    plain.unload_lora_weights()
    plain.transformer.save_pretrained(tmp_path / "merged")
    draw_pictures(
        METADATA[:1], tmp_path / "merge", how(model, samples=1, transformer=tmp_path / "merged", guidance_scale=3.0)
    )
    assert close(pixels(tmp_path / "merge"), expected, 2)
    strange = {"transformer.nowhere.lora_A.weight": torch.zeros(2, 4)}
    from safetensors.torch import save_file

    save_file(strange, tmp_path / "strange.safetensors")
    with pytest.raises(UserError, match="nowhere"):
        draw_pictures(METADATA, tmp_path / "strange", how(model, lora=tmp_path / "strange.safetensors"))


def test_guidance_and_size_reach_pipelines_that_name_them_otherwise(tmp_path):
    qwen = tiny_qwen_image.save_tiny(tmp_path / "qwen")
    drawn = {}
    for scale in (1.0, 60.0):
        draw_pictures(METADATA[:1], tmp_path / f"g{scale}", how(qwen, samples=1, guidance_scale=scale))
        drawn[scale] = pixels(tmp_path / f"g{scale}")
    assert not close(drawn[1.0], drawn[60.0], 8)
    kontext = tiny_flux.save_tiny(tmp_path / "kontext")
    draw_pictures(METADATA[:1], tmp_path / "k", how(kontext, samples=1))
    assert [value.shape for value in pixels(tmp_path / "k").values()] == [(32, 32, 3)]
    edit = json.loads((qwen / "model_index.json").read_text()) | {"_class_name": "QwenImageEditPlusPipeline"}
    (qwen / "model_index.json").write_text(json.dumps(edit))
    with pytest.raises(UserError, match="cannot draw from a prompt alone; give a text-to-image"):
        draw_pictures(METADATA[:1], tmp_path / "edit", how(qwen, lora=tmp_path / "is looked at later"))
    assert not (tmp_path / "edit").exists()
    with pytest.raises(UserError, match=r"no model_index\.json"):
        draw_pictures(METADATA[:1], tmp_path / "edit", how(kontext / "vae"))


# ------------------------------------------------------------------------------------------------- the command


def command(folder, metadata, model, evaluators, *more):
    drawing = ("--num-inference-steps", "2", "--resolution", "32", "--dtype", "float32", "--samples", "2")
    looking = ("--detector", evaluators[0], "--clip", evaluators[1], "--device", "cpu")
    return [
        str(x)
        for x in ("evaluate", "geneval", folder, "--metadata", metadata, "--model", model, *drawing, *looking, *more)
    ]


def test_one_command_draws_scores_and_sums_up(tmp_path, model, evaluators, small, capsys):
    metadata = tmp_path / "m.jsonl"
    lines = [*METADATA, tiny.line("a photo of a red cup", "colors", clause("cup", color="red"))]
    metadata.write_text("\n".join(map(json.dumps, lines)))
    args = command(tmp_path / "out", metadata, model, evaluators)
    assert main(args) == 0
    first = capsys.readouterr().out
    assert "6 pictures drawn, 0 were there" in first
    records = read_results(tmp_path / "out" / "results.jsonl")
    assert list(records[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert [one["tag"] for one in records] == ["single_object"] * 4 + ["colors"] * 2
    assert [json.loads(one["metadata"]) for one in records[::2]] == lines
    assert all(os.path.exists(one["filename"]) for one in records)
    for one in records:
        there = json.loads(one["details"])
        assert all(len(found) == 5 and found[4] > 0.3 for objects in there.values() for found in objects)
        if one["tag"] == "single_object":  # the verdict follows from the details
            assert one["correct"] is (json.loads(one["metadata"])["include"][0]["class"] in there)
    assert main(args) == 0
    again = capsys.readouterr().out
    assert "0 pictures drawn, 6 were there" in again
    assert "6 pictures scored, 0 were before" in first
    assert "0 pictures scored, 6 were before" in again
    assert again.splitlines()[2:] == first.splitlines()[2:]
    looked = [str(x) for x in (tmp_path / "out", "--detector", evaluators[0], "--clip", evaluators[1])]
    assert main(["evaluate", "geneval", *looked, "--results", str(tmp_path / "r.jsonl")]) == 0
    assert read_results(tmp_path / "r.jsonl") == records


class Seen:
    """A detector and the pictures that it looked at; after `limit` of them somebody stops it."""

    def __init__(self, limit=1000):
        self.pictures, self.limit = 0, limit

    def __call__(self, folder, device, classes):
        detect = load_detector(folder, device, classes)

        def look(pictures):
            if self.pictures + len(pictures) > self.limit:
                raise KeyboardInterrupt
            self.pictures += len(pictures)
            return detect(pictures)

        return look


def test_scoring_that_is_stopped_goes_on_and_only_what_changed_is_scored_again(
    tmp_path, evaluators, small, monkeypatch, capsys
):
    metadata = [tiny.line(), tiny.line("a red cup", "colors", clause("cup", color="red")), tiny.line("a dog again")]
    folder, results = tiny.save_pictures(tmp_path / "out", metadata), tmp_path / "scores" / "r.jsonl"
    kept = tmp_path / "scores" / "r.scored"

    def score(limit=1000, detector=evaluators[0], more=()):
        """(exit status, pictures looked at)"""
        seen = Seen(limit)
        monkeypatch.setattr(geneval_models, "load_detector", seen)
        args = [folder, "--detector", detector, "--clip", evaluators[1], "--results", results, "--device", "cpu", *more]
        return main(["evaluate", "geneval", *map(str, args)]), seen.pictures

    assert score(limit=4) == (130, 4)
    assert not results.exists()
    assert score() == (0, 2)
    assert "2 pictures scored, 4 were before" in capsys.readouterr().out
    resumed = read_results(results)
    # The same as in one go, and nothing is loaded or looked at again.
    assert score() == (0, 0)
    assert read_results(results) == resumed
    shutil.rmtree(kept)
    assert score() == (0, 6)
    assert read_results(results) == resumed
    # A line that is torn is scored again, and its file is mended.
    (first, second), torn = (kept / "00001.jsonl").read_text().splitlines(), kept / "00001.jsonl"
    for text in (f"{first}\n{second[:-9]}", f"{first[:40]}\n{second}\n", f"{first}\n[1]\n\x00"):
        torn.write_text(text)
        assert score() == (0, 1)
        mended = [json.loads(line) for line in torn.read_text().splitlines()]
        assert [line["key"] for line in mended] == [json.loads(line)["key"] for line in (first, second)]
    assert [line["correct"] for line in read_results(results)] == [line["correct"] for line in resumed]
    # So is a picture that was drawn again, all of a prompt that is another, and all for other eyes or options.
    tiny.picture(99).save(folder / "00002" / "samples" / "0001.png")
    assert score() == (0, 1)
    (folder / "00000" / "metadata.jsonl").write_text(json.dumps(tiny.line("a cat", "x", clause("cat"))))
    assert score() == (0, 2)
    assert {line["prompt"] for line in read_results(results)[:2]} == {"a cat"}
    assert score(more=("--max-overlap", "0.5")) == (0, 6)
    assert score(detector=tiny.save_detector(tmp_path / "other", seed=1)) == (0, 6)
    # A folder that is moved keeps its scores, under its new name.
    folder = folder.rename(tmp_path / "moved")
    assert score(detector=tmp_path / "other") == (0, 0)
    assert all(line["filename"].startswith(str(folder)) for line in read_results(results))


@pytest.mark.slow  # two more processes
def test_ranks_draw_and_score_what_one_process_does(tmp_path, model, evaluators, small, capsys):
    metadata = tmp_path / "m.jsonl"
    metadata.write_text("\n".join(json.dumps(tiny.line(f"a photo of dog {i}")) for i in range(3)))
    assert main(command(tmp_path / "one", metadata, model, evaluators)) == 0
    script = tmp_path / "rank.py"  # the detector sees small pictures there too
    script.write_text(
        "import sys\nfrom danceopd.evaluation.geneval import models as m\nm.SHORT, m.LONG = 96, 160\n"
        "from danceopd.cli.parser import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(
        [*launcher, *command(tmp_path / "two", metadata, model, evaluators)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "6 pictures drawn, 0 were there" in done.stdout
    assert done.stdout.count("overall") == 1
    assert close(pixels(tmp_path / "two"), pixels(tmp_path / "one"), 0)
    one, two = (read_results(tmp_path / name / "results.jsonl") for name in ("one", "two"))
    assert [r["correct"] for r in one] == [r["correct"] for r in two]
    assert [r["filename"].split("/")[-3:] for r in one] == [r["filename"].split("/")[-3:] for r in two]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give the FOLDER"),
        (["OUT"], "give --model to draw the pictures, --detector to score"),
        (["OUT", "--model", "M"], "--model draws the prompts of --metadata"),
        (["OUT", "--detector", "D", "--lora", "L"], "belong to a --model"),
        (["OUT", "--detector", "D", "--max-overlap", "0"], "--max-overlap above 0"),
        (["OUT", "--detector", "D", "--samples", "0"], "at least 1"),
        (["OUT", "--detector", "D", "--num-inference-steps", "-1"], "must be positive"),
        (["OUT", "--detector", "D", "--offload"], "--offload is for a CUDA device"),
        (["OUT", "--detector", "D"], "some prompts ask for colours; give --clip"),
        (["nowhere", "--detector", "D"], "there is no folder nowhere"),
        (["--results", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ],
)
def test_commands_that_say_too_little_are_refused(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    tiny.save_pictures(tmp_path / "OUT", [tiny.line("red", "colors", clause("cup", color="red"))])
    assert main(["evaluate", "geneval", *args, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_the_picture_worlds_evaluation_is_still_there(capsys):
    assert main(["evaluate", "nothing-of-this-name"]) == 2
    assert "embedded network" in capsys.readouterr().err


def test_check_metadata_returns_the_line_itself():
    metadata = tiny.line(note="kept")
    assert check_metadata(metadata, "here") is metadata
