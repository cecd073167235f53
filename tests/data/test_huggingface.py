"""A Hugging Face data set on disk becomes a manifest."""

import io
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from danceopd.cli.parser import main
from danceopd.data.huggingface import import_dataset
from danceopd.data.manifest import check_manifest, read_manifest
from danceopd.support.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)) for _ in range(3)]
    rows = {"uid": ["a", "b", "c"], "prompt": ["one", "two", "three"], "image": pictures}
    rows["input_image"] = [None, *pictures[:2]]
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "set")
    return tmp_path / "set", pictures


def test_rows_and_pictures_are_the_data_sets(folder, tmp_path, capsys):
    path, pictures = folder
    assert main(["data", "import", str(path), str(tmp_path / "out"), "--task", "edit"]) == 0
    assert "3 rows" in capsys.readouterr().out
    manifest = tmp_path / "out" / "manifest.jsonl"
    assert check_manifest(manifest) == []
    rows, _ = read_manifest(manifest)
    assert [(row.id, row.capability, row.prompt) for row in rows] == [
        ("a", "edit", "one"),
        ("b", "edit", "two"),
        ("c", "edit", "three"),
    ]
    assert rows[0].source_images == ()
    for row, picture in zip(rows, pictures, strict=True):
        assert np.array_equal(Image.open(row.target_image), picture)
    assert np.array_equal(Image.open(rows[2].source_images[0]), pictures[1])


def test_a_column_of_lists_of_pictures(folder, tmp_path):
    _, pictures = folder
    rows = datasets.Dataset.from_dict(
        {"prompt": ["one", "two"], "source_image": [[pictures[0]], pictures[1:]]},
        datasets.Features({"prompt": datasets.Value("string"), "source_image": datasets.List(datasets.Image())}),
    )
    rows.save_to_disk(tmp_path / "lists")
    manifest = import_dataset(tmp_path / "lists", tmp_path / "out", task="edit").path
    read, problems = read_manifest(manifest, needs_source=["edit"], decode=True)
    assert problems == []
    assert [len(row.source_images) for row in read] == [1, 2]
    for path, picture in zip([path for row in read for path in row.source_images], pictures, strict=True):
        assert np.array_equal(Image.open(path), picture)


def test_again_keeps_what_is_there(folder, tmp_path):
    path, _ = folder
    import_dataset(path, tmp_path / "out", task="edit")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").iterdir()}
    import_dataset(path, tmp_path / "out", task="edit")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "images").iterdir()} == before


def test_what_cannot_be_read(folder, tmp_path):
    path, _ = folder
    with pytest.raises(UserError, match="no column task"):
        import_dataset(path, tmp_path / "out")
    with pytest.raises(UserError, match="no split 'test'; there are train"):
        import_dataset(path, tmp_path / "out", split="test", task="t2i")
    with pytest.raises(UserError, match="not a data set"):
        import_dataset(tmp_path, tmp_path / "out", task="t2i")
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="no column of prompts"):
        import_dataset(tmp_path / "other", tmp_path / "out", task="t2i")
    datasets.Dataset.from_dict({"prompt": ["a"], "image": ["a.png"]}).save_to_disk(tmp_path / "paths")
    with pytest.raises(UserError, match="cast its column"):
        import_dataset(tmp_path / "paths", tmp_path / "out", task="t2i")


def test_the_published_column_layout(tmp_path):
    """uid, task, raw_task, prompt, source_image, target_image, caption_dict."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record = {"uid": "7", "task": "edit", "raw_task": "style", "prompt": "x", "source_image": "a.png"}
    (tmp_path / "m.jsonl").write_text(json.dumps(record | {"target_image": "a.png", "caption_dict": "{}"}) + "\n")
    (row,), problems = read_manifest(tmp_path / "m.jsonl")
    assert problems == []
    assert (row.id, row.capability, row.prompt) == ("7", "edit", "x")


def save_omniedit(folder, pictures):
    """Three rows as TIGER-Lab/OmniEdit-Filtered-1.2M has them."""
    value = datasets.Value
    features = {"omni_edit_id": value("string"), "task": value("string"), "src_img": datasets.Image()}
    features |= {"edited_img": datasets.Image(), "edited_prompt_list": datasets.List(value("string"))}
    features |= {"width": value("int64"), "height": value("int64"), "sc_score_1": value("float64")}
    features |= {"sc_reasoning": value("string"), "o_score": value("float64")}
    rows = {"omni_edit_id": ["a_1", "a_2", "a_3"], "task": ["removal", "style", "addition"], "src_img": pictures}
    rows |= {"edited_img": pictures[::-1], "width": [9] * 3, "height": [8] * 3, "sc_score_1": [1.0] * 3}
    rows["edited_prompt_list"] = [["remove it", "take the thing away"], ["as ink"], ["添加一个杯子"]]
    rows |= {"sc_reasoning": ["fine", "", "good"], "o_score": [2.0] * 3}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(folder)
    return folder


def save_gedit(folder, pictures):
    """Rows as stepfun-ai/GEdit-Bench has them: one of each language for a key."""
    rows = {"task_type": ["color_alter"] * 4, "key": ["k1", "k1", "k2", "k2"]}
    rows["instruction"] = ["make it red", "把它变成红色", "add a cup", "添加一个杯子"]
    rows |= {
        "instruction_language": ["en", "cn"] * 2,
        "input_image": [pictures[0], pictures[0], pictures[1], pictures[1]],
    }
    rows |= {"input_image_raw": rows["input_image"], "Intersection_exist": [True] * 4}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(folder)
    return folder


def imported_edits(saved, out):
    """The rows that one command makes of a data set of edits, none of them with a problem."""
    assert main(["data", "import", str(saved), str(out), "--task", "edit"]) == 0
    rows, problems = read_manifest(out / "manifest.jsonl", needs_source=["edit"], decode=True)
    assert problems == []
    return rows


def test_omniedit_is_imported_by_one_command(folder, tmp_path):
    _, pictures = folder
    saved = save_omniedit(tmp_path / "omni", pictures)
    rows = imported_edits(saved, tmp_path / "out")
    assert [(row.id, row.capability, row.prompt) for row in rows] == [
        ("a_1", "edit", "remove it"),
        ("a_2", "edit", "as ink"),
        ("a_3", "edit", "添加一个杯子"),
    ]
    assert rows[0].columns["prompt_2"] == "take the thing away"
    assert [row.columns["raw_task"] for row in rows] == ["removal", "style", "addition"]
    for row, source, target in zip(rows, pictures, pictures[::-1], strict=True):
        assert np.array_equal(Image.open(row.source_images[0]), source)
        assert np.array_equal(Image.open(row.target_image), target)
    assert main(["data", "import", str(saved), str(tmp_path / "kinds")]) == 0  # each kind of edit a task of its own
    rows, _ = read_manifest(tmp_path / "kinds" / "manifest.jsonl")
    assert [row.capability for row in rows] == ["removal", "style", "addition"]


def test_gedit_keeps_its_instructions_in_both_languages(folder, tmp_path):
    _, pictures = folder
    saved = save_gedit(tmp_path / "gedit", pictures)
    rows = imported_edits(saved, tmp_path / "out")
    assert [(row.id, row.prompt, row.columns["language"]) for row in rows] == [
        ("k1-en", "make it red", "en"),
        ("k1-cn", "把它变成红色", "cn"),
        ("k2-en", "add a cup", "en"),
        ("k2-cn", "添加一个杯子", "cn"),
    ]
    assert all(row.target_image is None for row in rows)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (16, 16), (210, 40, 60))
PICTURES = {  # bytes of a file, and the colour that it shows or a word of why it cannot be used
    "rgb": (encoded(RED), (210, 40, 60)),
    "cmyk jpeg": (encoded(RED.convert("CMYK"), "JPEG", quality=100, subsampling=0), (210, 40, 60)),
    "cmyk tiff": (encoded(RED.convert("CMYK"), "TIFF"), (210, 40, 60)),
    "palette": (encoded(RED.quantize(4)), (210, 40, 60)),
    "16 bits": (encoded(Image.fromarray(np.full((16, 16), 40_000, np.uint16))), (156, 156, 156)),
    "transparent": (encoded(Image.new("RGBA", (16, 16), (9, 9, 9, 0))), (255, 255, 255)),
    "one pixel": (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
    "floats": (encoded(Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF"), "floating-point"),
    "animated": (encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (16, 16))]), "holds 2 pictures"),
    "truncated": (encoded(Image.effect_noise((64, 64), 90))[:-900], "can't be decoded"),
    "huge": (encoded(Image.new("1", (9000, 9000))), "over 64 megapixels"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "readable are"),
    "empty": (b"", "readable are"),
    "missing": (None, "names a file, /etc/hostname, and holds no picture"),
}


def save_pictures(folder, names):
    """A data set of these pictures; as plain bytes and paths where one has no bytes, which datasets itself reads in."""
    rows = [{"bytes": PICTURES[name][0], "path": "/etc/hostname" if name == "missing" else None} for name in names]
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    text, kind = datasets.Value("string"), stored if "missing" in names else datasets.Image()
    columns = {"id": list(names), "prompt": ["x"] * len(names), "image": rows}
    features = datasets.Features({"id": text, "prompt": text, "image": kind})
    datasets.Dataset.from_dict(columns, features).save_to_disk(folder)
    return folder


def test_each_picture_is_written_in_its_colours_or_left_out_by_row(tmp_path, capsys):
    folder = save_pictures(tmp_path / "set", PICTURES)
    assert main(["data", "import", str(folder), str(tmp_path / "out"), "--task", "t2i"]) == 0
    said, names = capsys.readouterr().out, list(PICTURES)
    assert "7 rows of " in said
    assert check_manifest(tmp_path / "out" / "manifest.jsonl") == []
    rows = {row.id: row for row in read_manifest(tmp_path / "out" / "manifest.jsonl")[0]}
    listed = (tmp_path / "out" / "manifest.left_out.txt").read_text()
    for i, (name, (_, shows)) in enumerate(PICTURES.items()):
        if isinstance(shows, str):
            assert name not in rows
            (line,) = (line for line in listed.splitlines() if f"row {i}: {names[i]}: target_image" in line)
            assert shows in line
            assert str(folder) in line
        else:
            seen = np.asarray(Image.open(rows[name].target_image)).astype(int)
            assert np.abs(seen - shows).max() <= 3


def test_bad_rows_can_be_refused(tmp_path, capsys):
    folder = save_pictures(tmp_path / "set", ["rgb", "floats", "empty"])
    arguments = ["data", "import", str(folder), str(tmp_path / "out"), "--task", "t2i"]
    for more in (["--on-bad-row", "refuse"], ["--max-bad-rows", "1"]):
        assert main([*arguments, *more]) == 2
        said = capsys.readouterr().err
        assert "row 1: floats" in said
        assert "row 2: empty" in said
        assert not (tmp_path / "out" / "manifest.jsonl").exists()
    assert main([*arguments, "--max-bad-rows", "2"]) == 0
    assert (
        main(["data", "import", str(save_pictures(tmp_path / "bad", ["floats"])), str(tmp_path / "o"), "--task", "a"])
        == 2
    )
    assert "no row of" in capsys.readouterr().err


def test_odd_texts_are_left_out_by_row(tmp_path):
    rows = {
        "id": ["a", "a", "c", "d", "e"],
        "task": [0, 1, 0, 5, 0],
        "text": ["one", "two", None, "four", "  "],
    }
    features = {
        "id": datasets.Value("string"),
        "task": datasets.ClassLabel(names=["t2i", "edit"]),
        "text": datasets.Value("string"),
    }
    rows["task"][3] = None
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "set")
    done = import_dataset(tmp_path / "set", tmp_path / "out")
    assert [str(problem) for problem in done.problems] == [
        "row 1: a: its id is that of row 0 too",
        "row 2: c: prompt is a NoneType, not text",
        "row 3: d: task is a NoneType, not text",
        "row 4: e: prompt is empty",
    ]
    (row,), problems = read_manifest(done.path)
    assert (row.id, row.capability, problems) == ("a", "t2i", [])


def test_a_row_whose_bytes_are_damaged_is_left_out(tmp_path):
    datasets.Dataset.from_dict({"prompt": ["one", "second row", "three"]}).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"second row", b"\xff" * 10))
    done = import_dataset(tmp_path / "set", tmp_path / "out", task="t2i")
    (problem,) = done.problems
    assert str(problem).startswith("row 1: cannot be read (")
    assert [row.prompt for row in read_manifest(done.path)[0]] == ["one", "three"]


def test_two_data_sets_do_not_share_a_folder(tmp_path):
    """Their pictures would have the same names."""
    for name, color in (("a", "red"), ("b", "blue")):
        rows = {"prompt": ["x"], "image": [Image.new("RGB", (8, 8), color)]}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / name)
    first = import_dataset(tmp_path / "a", tmp_path / "out", task="t2i")
    before = first.path.read_bytes()
    with pytest.raises(UserError, match=r"holds pictures of split 'train' of .*/a, or of what it was then"):
        import_dataset(tmp_path / "b", tmp_path / "out", task="t2i")
    assert first.path.read_bytes() == before
    (tmp_path / "a").rename(tmp_path / "moved")
    assert import_dataset(tmp_path / "moved", tmp_path / "out", task="t2i").rows == 1
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "manifest.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.jsonl is there already"):
        import_dataset(tmp_path / "b", tmp_path / "own", task="t2i")


def test_offsets_that_point_elsewhere_are_no_addresses(tmp_path):
    """In a process of its own, which what is read through them would end."""
    rows = {"id": ["a", "b"], "task": ["t2i"] * 2, "prompt": ["one", "two"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    [file] = (tmp_path / "set").glob("*.arrow")
    data, offsets = file.read_bytes(), struct.pack("<3i", 0, 3, 6)  # of ids there are 0, 1, 2; of prompts these
    assert offsets in data
    file.write_bytes(data.replace(offsets, struct.pack("<3i", 0, 3, 2**31 - 1)))
    program = "import sys; from danceopd.cli.parser import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "data", "import", str(tmp_path / "set"), str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "row 1: cannot be read" in ran.stdout + ran.stderr
    assert [row.id for row in read_manifest(tmp_path / "out" / "manifest.jsonl")[0]] == ["a"]


def test_what_was_read_from_which_column_is_said(folder, tmp_path, capsys):
    _, pictures = folder
    rows = {"text": ["one", "two"], "caption": ["eins", "zwei"], "source": ["laion"] * 2, "output": pictures[:2]}
    rows |= {"control": pictures[1:], "source_image_raw": pictures[1:]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "named")
    assert main(["data", "import", str(tmp_path / "named"), str(tmp_path / "out"), "--task", "t2i"]) == 0
    said = capsys.readouterr().out
    assert "pictures of control, source_image_raw are left out" in said
    assert "read prompt from text, target_image from output\n" in said
    rows, problems = read_manifest(tmp_path / "out" / "manifest.jsonl", decode=True)
    assert problems == []
    assert [(row.prompt, row.columns["caption"], row.columns["source"]) for row in rows] == [
        ("one", "eins", "laion"),
        ("two", "zwei", "laion"),
    ]
    assert all(row.target_image and not row.source_images for row in rows)
