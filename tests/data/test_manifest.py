"""Manifests: every mistake named with its line."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from manifests import good, jsonl, picture
from PIL import Image

from danceopd.cli.parser import main
from danceopd.data.manifest import check_manifest, read_manifest
from danceopd.support import pictures


@pytest.fixture
def folder(tmp_path):
    """A data folder with one good picture, within a folder that holds another one."""
    picture(tmp_path / "outside.png")
    picture(tmp_path / "data" / "a.png")
    return tmp_path / "data"


def message_of(folder, record, **options):
    """The message about one record, which follows a good line and must be reported on line 2."""
    path = jsonl(folder / "m.jsonl", [good(), record])
    problems = check_manifest(path, **options)
    assert [problem.line for problem in problems] == [2], problems
    return problems[0].message


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"task": "t2i", "prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
        ("9" * 5000, "not JSON"),
        ({"task": "t2i"}, "no prompt"),
        (good(prompt="  "), "no prompt"),
        (good(prompt=3), "prompt is 3, not text"),
        (good(prompt=None), "no prompt"),
        (good(prompt="\ud800"), "lone surrogate"),
        (good(prompt="", caption_dict="no mapping"), "caption_dict is no mapping"),
        (good(prompt="", caption_dict="[1]"), "caption_dict is no mapping"),
        (good(prompt="", caption_dict={"caption": " "}), "no prompt"),
        (good(target_image="a.png", edited_image="b.png"), "edited_image 'b.png' is not there"),
        (good(capability="edit"), "differ"),
        (good(task=3), "task is 3, not text"),
        (good(task=3, capability="t2i"), "task is 3, not text"),
        (good(id=True), "id is true, not text"),
        (good(id="line 1"), "that of line 1"),
        (good(target_image="b.png"), "target_image 'b.png' is not there"),
        (good(target_image="."), "not a file"),
        (good(target_image="A.PNG"), "; there is a.png, with other upper and lower case"),
        (good(target_image=".\\a.png"), "; there is a.png, with slashes"),
        (good(target_image="..\\Outside.png"), "is not there (or not a file)"),
        (good(source_image="../outside.png"), "leads out of"),
        (good(source_image="a.png/../../outside.png"), "leads out of"),
        (good(source_image="a\0.png"), "not a path"),
        (good(source_image="a" * 5000), "not a path"),
        (good(target_image=["a.png"]), "not text"),
        (good(source_image={"path": "a.png"}), "not text"),
        (good(source_image=["a.png", "b.png"]), "source_image 'b.png' is not there"),
        (good(source_image=["a.png", "../outside.png"]), "leads out of"),
        (good(source_image=["a.png", ""]), "a list must hold paths"),
        (good(source_image=["a.png", ["a.png"]]), "a list must hold paths"),
    ],
)
def test_each_bad_line_is_reported(folder, record, words):
    assert words in message_of(folder, record)


def test_paths_that_leave_the_folder(folder):
    assert "absolute" in message_of(folder, good(target_image=str(folder / "a.png")))
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    assert "leads out of" in message_of(folder, good(target_image="link.png"))
    (folder / "door").symlink_to(folder.parent)
    assert "leads out of" in message_of(folder, good(target_image="door/outside.png"))
    (folder / "ring.png").symlink_to(folder / "ring.png")
    assert "ring.png" in message_of(folder, good(target_image="ring.png"))


def test_paths_that_stay_in_the_folder(folder):
    (folder / "link.png").symlink_to(folder / "a.png")
    (folder / "sub").mkdir()
    path = jsonl(folder / "m.jsonl", [good(target_image=name) for name in ("link.png", "sub/../a.png")])
    rows, problems = read_manifest(path)
    assert not problems
    assert {row.target_image for row in rows} == {(folder / "a.png").resolve()}
    path = jsonl(folder / "sub" / "m.jsonl", [good()])
    assert check_manifest(path)[0].line == 1
    assert not check_manifest(path, root=folder)


def test_damaged_pictures(folder, monkeypatch):
    (folder / "text.png").write_text("hello")
    assert "not a picture" in message_of(folder, good(source_image="text.png"))
    (folder / "none.png").touch()
    assert "not a picture" in message_of(folder, good(source_image="none.png"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        assert "can't be decoded" in message_of(folder, good(source_image=name))
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(folder / "float.tiff")
    assert "floating-point" in message_of(folder, good(source_image="float.tiff"))
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(folder / "deep.tiff")
    assert "16 bits" in message_of(folder, good(source_image="deep.tiff"))
    picture(folder / "big.png", size=(30, 10))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 299)
    assert "30 x 10" in message_of(folder, good(source_image="big.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "far over" in message_of(folder, good(source_image="big.png"))


def test_another_unicode_form_of_a_name(folder):
    composed, apart = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    for there, written in ((composed, apart), (apart, composed)):
        path = picture(folder / there)
        assert f"; there is {there}, with another Unicode form" in message_of(folder, good(target_image=written))
        path.unlink()


def test_pictures_too_long_or_with_several_in_a_file(folder):
    picture(folder / "long.png", size=(81, 10))
    picture(folder / "fits.png", size=(10, 80))
    assert "81 x 10 is longer than 8 : 1" in message_of(folder, good(source_image="long.png"))
    assert not check_manifest(jsonl(folder / "m.jsonl", [good(source_image="fits.png")]))
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(folder / "two.gif", save_all=True, append_images=frames[1:])
    assert "holds 2 pictures" in message_of(folder, good(source_image="two.gif"))


def test_many_rows_with_wrong_names_are_said_in_time(folder, monkeypatch):
    looked = []
    original = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: looked.append(self) or original(self))
    path = jsonl(folder / "m.jsonl", [good(target_image="A.png") for _ in range(500)])
    assert len(check_manifest(path)) == 500
    assert len(looked) == 1  # the folder is not looked through for every row


def test_a_tilde_that_the_shell_left(folder, capsys, monkeypatch):
    jsonl(folder / "m.jsonl", [good(target_image="../a.png")])
    (folder / "sub").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    assert main(["data", "check", "~/m.jsonl", "--root=~/sub"]) == 1
    assert f"leads out of the folder {(folder / 'sub').resolve()}" in capsys.readouterr().out


def test_check_may_pass_over_bad_rows(folder, capsys):
    path = jsonl(folder / "m.jsonl", [good(), good(target_image="b.png"), "{", good()])
    for options, status in (
        ([], 1),
        (["--on-bad-row", "skip"], 0),
        (["--on-bad-row", "skip", "--max-bad-rows", "1"], 1),
        (["--on-bad-row", "skip", "--max-bad-rows", "2"], 0),
    ):
        assert main(["data", "check", str(path), *options]) == status
        said = capsys.readouterr().out
        assert "line 2: target_image" in said
        assert "2 problems in 2 of 4 rows" in said
    assert main(["data", "check", str(jsonl(folder / "n.jsonl", ["{"])), "--on-bad-row", "skip"]) == 1


def test_all_problems_in_one_pass(folder):
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    records = [
        good(id="a"),
        "oops",
        "",
        {"id": "a", "target_image": "bad.png", "source_image": "../x"},
        good(task="edit"),
        good(target_image="bad.png"),
        good(task="edit", source_image="a.png"),
        good(task="edit", source_image=" "),
        good(id=[1]),
        good(id=[2]),
    ]
    path = jsonl(folder / "m.jsonl", records)
    problems = check_manifest(path, needs_source=["edit"])
    assert [problem.line for problem in problems] == [2, 4, 4, 4, 4, 5, 6, 8, 9, 10]
    assert str(problems[0]).startswith("line 2: not JSON")
    text = " | ".join(problem.message for problem in problems[1:5])
    for words in ("no prompt", "leads out", "id 'a' is that of line 1 too", "picture bad.png"):
        assert words in text
    assert "needs a source_image" in problems[5].message
    assert "needs a source_image" in problems[7].message
    rows, _ = read_manifest(path, needs_source=["edit"])
    assert [row.line for row in rows] == [1, 6, 7]  # without decoding, line 6 is good


PUBLISHED = """\
uid,task,raw_task,prompt,source_image,target_image,caption_dict
1,edit,style,make it red,a.png,a.png,{}
2,,,a dog,,,
3,edit,add,,a.png,,"{""caption"": ""add a cup""}"
4,edit,add, ,a.png,,"{'other': 'a second', 'instruction': 'add two cups'}"
5,t2i,,,,,"{'short': 'a cat'}"
"""


@pytest.mark.parametrize("name", ["m.csv", "prompts.txt", "m.dat", "m"])
def test_the_authors_seven_columns_are_read_in_a_file_of_any_suffix(folder, name):
    (folder / name).write_text(PUBLISHED)
    rows, problems = read_manifest(folder / name)
    assert problems == []
    assert [(row.id, row.capability, row.prompt) for row in rows] == [
        ("1", "edit", "make it red"),
        ("2", "default", "a dog"),
        ("3", "edit", "add a cup"),
        ("4", "edit", "add two cups"),
        ("5", "t2i", "a cat"),
    ]
    assert rows[0].columns["raw_task"] == "style"
    assert rows[2].columns["prompt"] == "add a cup"


def test_prompts_alone_are_of_the_default_task(folder):
    (folder / "prompts.txt").write_text('prompt\na dog\n"a cat, asleep"\n')
    rows, problems = read_manifest(folder / "prompts.txt")
    assert ([(row.capability, row.prompt) for row in rows], problems) == (
        [("default", "a dog"), ("default", "a cat, asleep")],
        [],
    )
    (folder / "lines.txt").write_text(json.dumps({"prompt": "a dog"}) + "\n")
    (row,), problems = read_manifest(folder / "lines.txt")
    assert (row.capability, row.prompt, problems) == ("default", "a dog", [])


def test_edited_image_is_the_target(folder):
    picture(folder / "b.png")
    (folder / "m.csv").write_text(
        "prompt,source_image,edited_image,target_image\nx,a.png,b.png,\ny,a.png,b.png,a.png\n"
    )
    (row,), (problem,) = read_manifest(folder / "m.csv")
    assert row.target_image == (folder / "b.png").resolve()
    assert problem.line == 3
    assert "target_image and edited_image differ" in problem.message


def test_files_of_no_use(folder):
    with pytest.raises(FileNotFoundError, match="no manifest"):
        read_manifest(folder / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_manifest(folder)
    for name in ("m.jsonl", "m.csv"):
        (folder / name).write_bytes(b" \n\n")
        with pytest.raises(ValueError, match="is empty"):
            read_manifest(folder / name)
        (folder / name).write_bytes("ok\ncafé".encode("latin-1"))
        with pytest.raises(ValueError, match=r"not UTF-8 \(line 2\)"):
            read_manifest(folder / name)
    (folder / "m.csv").write_text("task,prompt\n")
    with pytest.raises(ValueError, match="no rows"):
        read_manifest(folder / "m.csv")
    with pytest.raises(FileNotFoundError, match="folder of pictures"):
        read_manifest(jsonl(folder / "m.jsonl", [good()]), root=folder / "none")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("id;task;prompt\n1;t2i;a dog\n", 1, "separated by commas"),
        ("task,prompt,prompt\nt2i,a,b\n", 1, "named twice: prompt"),
        ("task,prompt\nt2i,a dog,and a cat\n", 2, "3 cells under 2 columns"),
        ("task,prompt\nt2i\n", 2, "no prompt"),
        ('task,prompt\nt2i,"two\nlines"\n\nt2i,\n', 5, "no prompt"),
        ('task,prompt\nt2i,a dog\nt2i,"open\nend\n', 3, "close every quote"),
    ],
)
def test_csv_problems(folder, text, line, words):
    (folder / "m.csv").write_text(text)
    problems = check_manifest(folder / "m.csv")
    assert [problem.line for problem in problems] == [line]
    assert words in problems[0].message


def test_a_list_in_a_csv_cell_must_be_json(folder):
    (folder / "m.csv").write_text("task,prompt,source_image\nedit,x,['a.png']\nedit,y,[]\nedit,z,a.png\n")
    rows, problems = read_manifest(folder / "m.csv", needs_source=["edit"])
    assert [len(row.source_images) for row in rows] == [1]
    assert [problem.line for problem in problems] == [2, 3]
    assert 'write a list as ["a.png", "b.png"]' in problems[0].message
    assert "needs a source_image" in problems[1].message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_csv_and_jsonl_are_equal(folder, encoding, newline):
    records = [
        {"id": "1", "task": "t2i", "prompt": 'a "red" dog, größer', "target_image": "a.png", "note": "x"},
        {
            "id": "2",
            "task": "edit",
            "prompt": "add 狗\u2028",
            "target_image": "a.png",
            "source_image": "a.png",
        },
        {"id": "3", "task": "edit", "prompt": "join", "source_image": ["b;1.png", "a.png", "b;1.png"]},
        {"id": "4", "task": "t2i", "prompt": "an empty list", "source_image": []},
        {"task": "t2i", "prompt": "no pictures"},
    ]
    picture(folder / "b;1.png")
    buffer = io.StringIO(newline="")
    columns = ["id", "task", "prompt", "note", "source_image", "target_image"]
    writer = csv.DictWriter(buffer, columns, lineterminator=newline)
    writer.writeheader()
    lists = [row for row in records if isinstance(row.get("source_image"), list)]
    writer.writerows(
        row | {"source_image": json.dumps(row["source_image"])} if row in lists else row for row in records
    )
    (folder / "m.csv").write_bytes(buffer.getvalue().encode(encoding))
    text = newline.join(json.dumps(record, ensure_ascii=False) for record in records)
    (folder / "m.JSONL").write_bytes(text.encode(encoding))
    (rows, problems), (other, other_problems) = (read_manifest(folder / name) for name in ("m.csv", "m.JSONL"))
    assert problems == other_problems == []
    keys = ("id", "capability", "prompt", "source_images", "target_image")
    strip = [[getattr(row, key) for key in keys] for row in rows[:4]]
    assert strip == [[getattr(row, key) for key in keys] for row in other[:4]]
    assert [[path.name for path in row.source_images] for row in rows] == [
        [],
        ["a.png"],
        ["b;1.png", "a.png", "b;1.png"],
        [],
        [],
    ]
    assert [(row.line, row.id) for row in rows] == [(2, "1"), (3, "2"), (4, "3"), (5, "4"), (6, "line 6")]
    assert [(row.line, row.id) for row in other] == [(1, "1"), (2, "2"), (3, "3"), (4, "4"), (5, "line 5")]
    assert rows[1].prompt == "add 狗"


def test_columns_that_are_not_read_are_named(folder, capsys):
    """Nothing of a row is passed over without a word: a source under another name made an edit a drawing."""
    records = [good() | {"raw_task": "x", "prompt_de": "y"}]  # columns of one's own say nothing
    records += [{"prompt": "an edit", "source": "a.png", "target": ["a.png"], "image": "none", "Task": "edit"}] * 2
    records += [{"prompt": "one", "sourc_image": "a.png", "caption": "read in prompt"}]
    path = jsonl(folder / "m.jsonl", records)
    assert main(["data", "check", str(path)]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warned == [
        f"warning: {count} of 4 rows have a column {name!r}, which is not read; rename it to {wanted!r} if it is that"
        for count, name, wanted in (
            (2, "source", "source_image"),
            (2, "target", "target_image"),
            (2, "Task", "task"),
            (1, "sourc_image", "source_image"),
        )
    ]


@pytest.mark.parametrize("name", ["caption", "Prompt", "promt", "edit-instruction"])
def test_a_prompt_under_another_name_is_named(folder, name):
    record = {name: "x", "target_image": "a.png"}
    assert f"no prompt; describe the picture or the edit (the column {name!r} is not read" in message_of(folder, record)
    (folder / "m.csv").write_text(f"{name},target_image\nx,a.png\n")
    (problem,) = check_manifest(folder / "m.csv")
    assert f"rename {name!r} to it" in problem.message
