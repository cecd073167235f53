"""GEdit-Bench's rows: from any layout of the data set, and what is wrong with one."""

import numpy as np
import pytest
from gedit_runs import columns, datasets, save

from danceopd.evaluation.gedit.benchmark import KINDS, PAPER_KINDS, kinds_of, read_benchmark
from danceopd.support.errors import UserError


def test_rows_of_kinds_languages_and_the_subset(root):
    rows = read_benchmark(root / "benchmark").rows
    assert [(row.kind, row.language, row.key) for row in rows] == [
        (kind, "en", f"{2 * i:04x}") for i, kind in enumerate(PAPER_KINDS)
    ]
    assert len(read_benchmark(root / "benchmark", ["subject-add"], ["en", "cn"]).rows) == 2
    inside = read_benchmark(root / "benchmark", PAPER_KINDS[1:3], ["en"], "intersection")
    assert [row.key for row in inside.rows] == ["0002", "0004"]
    assert inside.rows[0].instruction == "make it red 2"


def test_a_data_set_with_splits_and_a_folder_of_parquet_are_the_same(root, tmp_path):
    data = datasets.load_from_disk(str(root / "benchmark"))
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    data.select(range(5)).to_parquet(tmp_path / "parquet" / "data" / "train-0.parquet")
    data.select(range(5, 12)).to_parquet(tmp_path / "parquet" / "data" / "train-1.parquet")
    plain = read_benchmark(root / "benchmark")
    for folder in (tmp_path / "splits", tmp_path / "parquet"):
        other = read_benchmark(folder)
        assert other.rows == plain.rows
        for raw in (False, True):
            assert np.array_equal(other.picture(other.rows[3], raw), plain.picture(plain.rows[3], raw))


def test_kinds_are_known_by_either_spelling():
    assert kinds_of(["paper"]) == PAPER_KINDS
    assert kinds_of(["all"]) == KINDS
    assert kinds_of(["color-alter", "subject_add", "color_alter"]) == ("color_alter", "subject-add")
    with pytest.raises(UserError, match="no kind 'colour'"):
        kinds_of(["colour"])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"key": None, "input_image": None}, "lacks the columns key, input_image; it has"),
        ({"task_type": ["subject-add"] * 11 + ["dancing"]}, "row 11 is of task_type 'dancing'"),
        ({"instruction_language": ["en"] * 11 + ["fr"]}, "language 'fr'"),
        ({"key": ["../../evil", *("abcdefghijk")]}, "'../../evil' of row 0 is no file's name"),
        ({"key": ["a"] * 12, "task_type": ["subject-add"] * 12}, "two rows have the key a in subject-add/en"),
        ({"task_type": ["subject-add"] * 12}, "has no rows of subject-replace, background_change"),
        ({"input_image": ["no picture"] * 12}, "cannot be read|holds no pictures"),
    ],
)
def test_a_data_set_of_no_use(tmp_path, changed, match):
    folder = save(tmp_path / "set", **changed)
    with pytest.raises(UserError, match=match):
        read_benchmark(folder).picture(read_benchmark(folder).rows[0])


def test_a_picture_that_is_damaged_names_its_row(tmp_path):
    broken = datasets.Dataset.from_dict({**columns(), "input_image": [{"bytes": b"\x89PNG no", "path": None}] * 12})
    broken.save_to_disk(tmp_path / "set")
    benchmark = read_benchmark(tmp_path / "set")
    with pytest.raises(UserError, match="input_image of 0002 cannot be read"):
        benchmark.picture(benchmark.rows[1])


def test_a_folder_of_no_use(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        read_benchmark(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no data set of save_to_disk"):
        read_benchmark(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="nor of parquet"):
        read_benchmark(tmp_path)
    with pytest.raises(UserError, match="no column Intersection_exist"):
        read_benchmark(save(tmp_path / "set", Intersection_exist=None), subset="intersection")
    assert read_benchmark(tmp_path / "set").rows[0].intersection is None
