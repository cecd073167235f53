"""GenEval's files: its prompts, folders of pictures of any tool, and results."""

import json
import shutil

import pytest
import tiny_geneval as tiny
from geneval_runs import as_results, clause, result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danceopd.evaluation.geneval import Found, check_picture
from danceopd.evaluation.geneval.layout import check_metadata, read_metadata, read_pictures, read_results
from danceopd.evaluation.geneval.rules import CLASSES
from danceopd.support.errors import UserError


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
        (lambda m: {"tag": "x", "prompt": "y", "includes": m["include"]}, "did you mean 'includes'"),
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
        (lambda m: {**m, "include": [clause("dog"), clause("cat", position=["left of", 0.0])]}, "an earlier clause"),
        (lambda m: {**m, "include": [clause("dog"), clause("cat", position=["left of", False])]}, "an earlier clause"),
        (lambda m: {**m, "include": [clause(["dog"])]}, "asks for the class ['dog']"),
        (lambda m: {**m, "include": [clause("dog", {})]}, "needs a count"),
        (lambda m: {**m, "exclude": None}, "must be a list"),
        (lambda m: {**m, "exclude": [clause("dog", color="red")]}, "unknown key 'color'"),
    ],
)
def test_wrong_metadata_is_said_with_its_line(tmp_path, change, message):
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(tiny.line())}\n{json.dumps(change(tiny.line()))}\n")
    with pytest.raises(UserError, match=r"m\.jsonl:2: ") as caught:
        read_metadata(tmp_path / "m.jsonl")
    assert message in str(caught.value)


def test_files_that_are_no_metadata_are_said(tmp_path):
    for text, message in (
        ("{", r":1: not JSON, or torn"),
        ("\n", "is empty"),
        ("[" * 9999, "nests too deep"),
        ('{"tag": "a", "tag": "b"}', "'tag' stands twice"),
    ):
        (tmp_path / "m.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            read_metadata(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b"a\xff\xfe")
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


def test_lines_that_are_no_results_are_said(tmp_path):
    for wrong in ({"tag": "x"}, {**result(), "correct": 1}, {**result(), "metadata": {}}, [1]):
        with pytest.raises(UserError, match=r"r\.jsonl:2: no "):
            read_results(as_results(tmp_path / "r.jsonl", [result(), wrong]))


def test_check_metadata_returns_the_line_itself():
    metadata = tiny.line(note="kept")
    assert check_metadata(metadata, "here") is metadata


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u2029"])
def test_a_prompt_with_a_separator_in_a_marked_file(tmp_path, separator):
    lines = [tiny.line(f"a{separator}dog"), tiny.line("two")]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "m.jsonl").write_text(text, encoding="utf-8-sig")
    assert read_metadata(tmp_path / "m.jsonl") == lines
    (tmp_path / "m.jsonl").write_text(text + "{torn\n", encoding="utf-8-sig")
    with pytest.raises(UserError, match=r"m\.jsonl:3: not JSON"):
        read_metadata(tmp_path / "m.jsonl")


ODD = [None, True, -1, 0.0, 1.5, "x", "", "dog", [], {}, ["left of", 0], [[]], {"class": "dog"}, 10**30, "\ud800"]


@given(st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_metadata_is_refused_or_judged(tmp_path, data):
    """One value anywhere in a prompt's line replaced or taken out: a message with its line, or a verdict."""
    clauses = [clause("cat", 2), clause("dog", color="red", position=["left of", 0])]
    line = {"tag": "x", "prompt": "y", "include": clauses, "exclude": [clause("dog", 3)]}
    root = {"line": line}
    place, key = root, "line"
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 4)):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    if isinstance(place, dict) and place is not root and data.draw(st.booleans()):
        place.pop(key)
    else:
        place[key] = data.draw(st.sampled_from(ODD))
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(root["line"]) + "\n")
    said = ""
    try:
        (read,) = read_metadata(path)
    except UserError as error:
        said = str(error)
    if said:
        assert "m.jsonl" in said
        return
    objects = {"cat": [Found((0, 0, 9, 9), 0.9)] * 2, "dog": [Found((20, 0, 29, 9), 0.9)]}
    correct, reason = check_picture(read, objects, lambda name, found: ["red"] * len(found))
    assert correct == (not reason)
