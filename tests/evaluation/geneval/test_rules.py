"""GenEval's rules: counts, colours and relations by hand, and their laws."""

import pytest
from geneval_runs import box, clause, found
from hypothesis import given
from hypothesis import strategies as st

from danceopd.evaluation.geneval.rules import MAX_OBJECTS, RELATIONS, Found, check_picture, kept, relations

NAMES = ("dog", "cat", "cup")
boxes = st.builds(box, *[st.integers(0, 200)] * 2, *[st.integers(1, 80)] * 2)


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


def no_colors(name, objects):
    raise AssertionError("no colour was asked")


def verdict(objects, *include, exclude=(), colors_of=no_colors):
    return check_picture({"include": list(include), "exclude": list(exclude)}, objects, colors_of)[0]


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


detections = st.lists(st.builds(Found, boxes, st.floats(0.01, 1.0)), max_size=5)


scenes = st.fixed_dictionaries(dict.fromkeys(NAMES, detections))


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
