"""Compared runs: what is paired, what the intervals say, and what the page shows."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny_geneval as tiny
from browser import sticking_out
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from danceopd.cli.parser import main
from danceopd.evaluation.compare import (
    Run,
    Scored,
    compare,
    distinct,
    file_uri,
    paired,
    read_run,
    table,
    warnings_of,
    write_page,
)
from danceopd.evaluation.geneval.layout import read_results, record, write_results
from danceopd.support.errors import UserError


def as_run(name, scores, tag=lambda prompt: "colors"):
    """scores: by (prompt, number)."""
    pictures = {key: Scored(tag(key[0]), key[0], float(value), Path("0.png")) for key, value in scores.items()}
    return Run(name, pictures)


verdicts = st.dictionaries(
    st.tuples(st.sampled_from([f"{tag} {i}" for tag in ("colors", "position") for i in range(4)]), st.integers(0, 3)),
    st.tuples(st.booleans(), st.booleans()),
    min_size=1,
)


def tag_of(prompt):
    return prompt.split()[0]


@given(verdicts)
def test_differences_are_those_of_the_pairs_and_change_sign_with_the_order(pairs):
    a, b = (as_run(str(i), {key: both[i] for key, both in pairs.items()}, tag_of) for i in (0, 1))
    there, back = compare(a, b), compare(b, a)
    means = {}
    for (prompt, _), (first, second) in pairs.items():
        means.setdefault(tag_of(prompt), []).append(float(second) - float(first))
    for tag, values in means.items():
        assert there.tags[tag].mean == pytest.approx(np.mean(values))
        assert there.tags[tag].low - 1e-9 <= np.mean(values) <= there.tags[tag].high + 1e-9
    assert there.overall.mean == pytest.approx(np.mean([np.mean(values) for values in means.values()]))
    assert back.overall.mean == pytest.approx(-there.overall.mean)
    assert [round(d, 9) for d, _ in there.prompts] == sorted(round(d, 9) for d, _ in there.prompts)
    assert [-d for d, _ in back.prompts][::-1] == [d for d, _ in there.prompts]
    assert there.pairs == len(pairs)
    same = compare(a, a)
    assert (same.overall.low, same.overall.mean, same.overall.high) == (0, 0, 0)


def test_intervals_hold_the_true_difference_as_often_as_they_say(monkeypatch):
    """100 prompts of four pictures that are right or wrong together: the difference is 0.2."""
    monkeypatch.setattr("danceopd.evaluation.compare.RESAMPLES", 1000)
    generator, held, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        a, b = (generator.random(100) < p for p in (0.5, 0.7))
        runs = [
            as_run(n, {(f"p{i}", k): x for i, x in enumerate(values) for k in range(4)})
            for n, values in (("a", a), ("b", b))
        ]
        interval = compare(*runs, seed=int(generator.integers(1 << 30))).overall
        held += interval.low <= 0.2 <= interval.high
    assert 0.90 <= held / trials <= 0.985


def test_scores_and_differences_are_of_the_pictures_that_all_runs_have():
    a = as_run("a", {("p", 0): 1, ("p", 1): 0, ("q", 0): 1})
    b = as_run("b", {("p", 0): 0, ("p", 1): 1, ("r", 0): 1})
    c = as_run("c", {("p", 0): 0, ("q", 0): 1})
    runs = paired([a, b, c])
    assert [run.scores()[0] for run in runs] == [1, 0, 0]
    comparisons = [compare(runs[0], run) for run in runs[1:]]
    assert [(one.pairs, one.overall.mean) for one in comparisons] == [(1, -1), (1, -1)]
    assert warnings_of(runs, comparisons) == [
        "a: 2 of its 3 pictures are left out, since another run lacks them",
        "b: 2 of its 3 pictures are left out, since another run lacks them",
        "c: 1 of its 2 pictures is left out, since another run lacks it",
        "a tag has 1 prompt: its interval, and that of overall, are too narrow",
    ]
    whole = paired([as_run(name, {(f"p{i}", 0): 1 for i in range(10)}) for name in "ab"])
    assert warnings_of(whole, [compare(*whole)]) == []
    with pytest.raises(UserError, match="a and d have no picture of the same prompt"):
        paired([a, as_run("d", {("p", 7): 1})])


def test_what_compare_prints_is_of_the_pictures_that_all_runs_have(tmp_path, capsys):
    a = save_run(tmp_path / "a", [[True], [True], [True]])
    b = save_run(tmp_path / "b", [[True], [False], [False]])
    write_results(b / "results.jsonl", read_results(b / "results.jsonl")[:2])
    assert main(["compare", str(a), str(b), "-o", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "warning: a: 1 of its 3 pictures is left out, since another run lacks it" in printed
    columns = [line.split()[:2] for line in printed.splitlines() if line.startswith(("a ", "b "))]
    assert columns == [["a", "1.000"], ["b", "0.500"], ["b", "-"]]
    assert re.search(r"b - a +-0\.500", printed)


METADATA = [
    tiny.line("a photo of a dog"),
    tiny.line("<script>alert(1)</script> & \"a\" 'cat'", "two_object", {"class": "cat", "count": 1}),
    tiny.line("two dogs", "counting", {"class": "dog", "count": 2}, exclude=[{"class": "dog", "count": 3}]),
]


def save_run(folder, verdicts, reason="", seed=None):
    """A folder as `evaluate geneval` leaves it; verdicts: by prompt, of each picture."""
    tiny.save_pictures(folder, METADATA, samples=len(verdicts[0]))
    lines = []
    for index, (metadata, row) in enumerate(zip(METADATA, verdicts, strict=True)):
        for number, correct in enumerate(row):
            path = folder / f"{index:05d}" / "samples" / f"{number:04d}.png"
            lines.append(record(path, metadata, {}, correct, "" if correct else reason))
    write_results(folder / "results.jsonl", lines)
    if seed is not None:
        (folder / "generation.json").write_text(json.dumps({"seed": seed}))
    return folder


class Page(HTMLParser):
    """The tags that a page has, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_has_the_worst_and_the_best_prompts_and_needs_no_other_file(tmp_path, capsys):
    a = save_run(tmp_path / "a", [[True, True], [False, False], [True, False]])
    b = save_run(tmp_path / "b", [[True, False], [True, True], [True, False]], reason="dog: <b>1</b> asked, 0 found")
    assert main(["compare", str(a), str(b), "-o", str(tmp_path / "sub" / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"b - a +\+0\.167", printed)  # the mean of -1/2, 1 and 0
    text = (tmp_path / "sub" / "page.html").read_text()
    page, words = Page(text), " ".join(Page(text).text)
    assert page.tags.count("article") == 2, "the third prompt is the same in both"
    order = ("Where b is worse", "a photo of a dog", "Where b is better", "alert(1)", "All scores")
    places = [words.index(text) for text in order]
    assert places == sorted(places), "pictures come before the table"
    assert "GenEval: too few prompts to tell b from a (+0.167" in words
    assert page.tags.count("img") == 8
    assert "script" not in page.tags
    assert METADATA[1]["prompt"] in words
    assert "dog: <b>1</b> asked, 0 found" in words
    for name, value in page.attributes:
        assert name not in ("href", "srcset")
        assert not name.startswith("on")
        assert name != "src" or value.startswith("data:image/png;base64,")
    assert str(tmp_path) not in text


def test_runs_without_a_difference_show_their_pictures_all_the_same(tmp_path):
    a, b = (save_run(tmp_path / name, [[True, False], [False, False], [True, True]]) for name in "ab")
    assert main(["compare", str(a), str(b), "-o", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    words = " ".join(page.text)
    assert "too few prompts to tell b from a (+0.000 (+0.000 to +0.000))" in words
    assert "Scored alike" in words
    assert "Where b is" not in words
    assert (page.tags.count("article"), page.tags.count("img")) == (3, 12)


def test_three_runs_and_equal_names_are_told_apart(tmp_path, capsys):
    runs = [save_run(tmp_path / str(i) / "out", [[i > 0], [i > 1], [True]], seed=i % 2) for i in range(3)]
    assert main(["compare", *map(str, runs), "-o", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "out (2) - out (1)" in printed
    assert "out (3) - out (1)" in printed
    assert "warning: drawn from different seeds (out (1) 0, out (2) 1, out (3) 0)" in printed
    words = " ".join(Page((tmp_path / "page.html").read_text()).text)
    assert words.count("against out (1)") == 2
    assert "different seeds" in words


def test_results_of_another_tool_are_compared_where_its_pictures_were_moved(tmp_path):
    a, b = (save_run(tmp_path / name, [[True], [False], [True]]) for name in "ab")
    lines = [
        line | {"filename": f"elsewhere/{'/'.join(line['filename'].split('/')[-3:])}"}
        for line in read_results(b / "results.jsonl")
    ]
    for line in lines:
        del line["reason"]
    write_results(b / "theirs.jsonl", lines)
    first, other = read_run(a), read_run(b / "theirs.jsonl")
    assert other.name == "b/theirs"
    assert compare(first, other).pairs == 3
    assert all(one.path.is_file() for one in other.pictures.values())
    for picture in b.rglob("*.png"):
        picture.unlink()
    (a / "00001" / "samples" / "0000.png").write_bytes(b"no picture")
    assert file_uri(a / "00001" / "samples" / "0000.png") is None
    runs = distinct([first, read_run(save_run(tmp_path / "c", [[False], [True], [True]]))])
    for picture in (tmp_path / "c").rglob("*.png"):
        picture.unlink()
    write_page(tmp_path / "page.html", runs, [compare(*runs)])
    assert (tmp_path / "page.html").read_text().count("the picture is not there") == 3
    assert table(runs, [compare(*runs)])[0] == ["", "overall", "single_object", "two_object", "counting"]


def test_of_a_prompt_with_many_pictures_some_are_shown(tmp_path):
    a, b = (save_run(tmp_path / name, [[verdict] * 40] * 3) for name, verdict in (("a", True), ("b", False)))
    runs = [read_run(a), read_run(b)]
    write_page(tmp_path / "page.html", runs, [compare(*runs)])
    page = (tmp_path / "page.html").read_text()
    assert page.count("8 of 40 pictures") == 3
    assert page.count("<img ") == 3 * 2 * 8


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_sticks_out_of_the_screen(tmp_path, width):
    runs = [read_run(save_run(tmp_path / name, [[verdict] * 3] * 3)) for name, verdict in (("a", True), ("b", False))]
    write_page(tmp_path / "page.html", runs, [compare(*runs)])
    assert sticking_out(tmp_path / "page.html", width) == []


@pytest.mark.parametrize("seed", [[1], {"a": 1}, "1", None, 2.5])
def test_a_seed_of_an_odd_type_is_none(tmp_path, seed):
    a, b = (save_run(tmp_path / name, [[True], [False], [True]]) for name in "ab")
    (a / "generation.json").write_text(json.dumps({"seed": seed}))
    assert main(["compare", str(a), str(b), "-o", str(tmp_path / "page.html")]) == 0
    assert read_run(a).seed is None


def test_a_folder_whose_name_is_no_text(tmp_path):
    a, b = (save_run(tmp_path / name, [[True], [False], [True]]) for name in ("a", os.fsdecode(b"caf\xe9")))
    assert main(["compare", str(a), str(b), "-o", str(tmp_path / "page.html")]) == 0
    assert "caf? against a" in " ".join(Page((tmp_path / "page.html").read_text()).text)


def test_large_pictures_are_made_small_in_the_page(tmp_path):
    tiny.picture(0, 1024, 512).save(tmp_path / "large.png")
    tiny.picture(0, 64, 64).save(tmp_path / "small.png")
    assert file_uri(tmp_path / "large.png").startswith("data:image/jpeg;base64,")
    assert len(file_uri(tmp_path / "large.png")) < 30_000
    assert file_uri(tmp_path / "small.png").startswith("data:image/png;base64,")


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    a = save_run(tmp_path / "a", [[True], [False], [True]])

    def refused(*runs):
        assert main(["compare", *map(str, runs), "-o", str(tmp_path / "page.html")]) == 2
        assert not (tmp_path / "page.html").exists()
        return capsys.readouterr().err

    assert "give two runs" in refused(a)
    assert "there are no results in" in refused(a, tmp_path)
    assert "there is no gone; give the folder" in refused(a, "gone")
    lines = read_results(a / "results.jsonl")
    for change, message in (
        ({"filename": "grid.png"}, "no number as its name"),
        ({"metadata": "{"}, "is not JSON"),
        ({"prompt": "\ud83d"}, "half a character"),
    ):
        write_results(tmp_path / "b.jsonl", [lines[0] | change])
        assert message in refused(a, tmp_path / "b.jsonl")
    write_results(tmp_path / "b.jsonl", [lines[0], lines[0]])
    assert "two lines for picture 0000" in refused(a, tmp_path / "b.jsonl")


def test_a_prompt_that_a_benchmark_asks_twice_is_paired_by_its_folders(tmp_path):
    a = save_run(tmp_path / "a", [[True], [False], [True]])
    first, second, third = read_results(a / "results.jsonl")
    again = second | {"metadata": first["metadata"], "prompt": first["prompt"], "tag": first["tag"]}
    write_results(tmp_path / "one.jsonl", [first, again, third])
    write_results(tmp_path / "other.jsonl", [third, again | {"correct": True}, first])  # in an order of its own
    one, other = read_run(tmp_path / "one.jsonl"), read_run(tmp_path / "other.jsonl")
    made = compare(one, other)
    assert made.pairs == 3
    assert sorted(difference for difference, _ in made.prompts) == [0, 0, 1]


def test_runs_of_the_picture_world_are_compared(tmp_path, capsys):
    few = ["--per-task", "3", "--per-kind", "1", "--num-inference-steps", "2"]
    for name in ("base", "t2i"):
        assert main(["evaluate", name, *few, "--pictures", str(tmp_path / name)]) == 0
    runs = [read_run(tmp_path / name) for name in ("base", "t2i")]
    assert runs[0].pictures.keys() == runs[1].pictures.keys()
    assert len(runs[0].pictures) == 18
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "base"), str(tmp_path / "t2i"), "-o", str(tmp_path / "page.html")]) == 0
    assert "t2i - base" in capsys.readouterr().out
    assert main(["evaluate", "base", *few, "--pictures", str(tmp_path / "base")]) == 2
    assert "is there already" in capsys.readouterr().err


def renamed(run, names):
    """The results of a run with other file names, one for each of its pictures."""
    lines = [
        line | {"filename": str(name)} for line, name in zip(read_results(run / "results.jsonl"), names, strict=True)
    ]
    write_results(run / "results.jsonl", lines)
    return run


def test_no_picture_from_outside_a_runs_folder_is_in_the_page(tmp_path, capsys):
    tiny.picture(0, 8, 8).save(tmp_path / "0.png")
    (tmp_path / "secret").mkdir()
    tiny.picture(0, 8, 8).save(tmp_path / "secret" / "0.png")
    a, b = (save_run(tmp_path / name, [[name == "a"]] * 3) for name in "ab")
    (b / "links").mkdir()
    (b / "links" / "0.png").symlink_to(tmp_path / "secret" / "0.png")
    renamed(a, [tmp_path / "0.png", "../secret/0.png", "x/../../secret/0.png"])
    renamed(b, [tmp_path / "secret" / "0.png", "links/0.png", "/proc/self/../0.png"])
    assert all(one.path is None for run in (a, b) for one in read_run(run).pictures.values())
    assert main(["compare", str(a), str(b), "-o", str(tmp_path / "page.html")]) == 0
    assert "warning: a: 3 of its pictures are not in its folder" in capsys.readouterr().out
    assert "data:image" not in (tmp_path / "page.html").read_text()


def test_pictures_of_other_formats_or_sizes_are_not_opened(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    for name, data in (
        ("ps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"),
        ("torn.png", b"\x89PNG\r\n\x1a\n"),
    ):
        (tmp_path / name).write_bytes(data)
        assert file_uri(tmp_path / name) is None
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    assert file_uri(tmp_path / "large.png") is None
    assert not (tmp_path / "started").exists()


def test_results_of_odd_kinds_are_said(tmp_path):
    a = save_run(tmp_path / "a", [[True], [False], [True]])
    lines = read_results(a / "results.jsonl")
    for change, message in (
        ({"metadata": "[" * 9999}, "nests too deep"),
        ({"metadata": '{"tag": 1, "tag": 2}'}, "stands twice"),
        ({"filename": "1" * 5000 + ".png"}, "no number as its name"),
    ):
        write_results(tmp_path / "b.jsonl", [lines[0] | change])
        with pytest.raises(UserError, match=message):
            read_run(tmp_path / "b.jsonl")
    place = tmp_path / "out" / "scores" / "method" / "judge"
    place.mkdir(parents=True)
    for text in (json.dumps({"benchmark": "GEdit-Bench", "method": "../..", "rows": []}), "[" * 9999, "5"):
        (place / "results.json").write_text(text)
        with pytest.raises(UserError, match=r"results\.json"):
            read_run(place)
