"""A Hugging Face data set on disk becomes a manifest."""

import json

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
