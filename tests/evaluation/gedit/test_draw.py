"""GEdit's edits: the plain pipelines' own, the same on any rank and after a stop."""

import numpy as np
import pytest
import tiny_flux2
import tiny_qwen_image
import torch
from diffusers import FluxKontextPipeline
from gedit_runs import EDITING, SIZE
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from danceopd.evaluation.gedit.benchmark import KINDS, PAPER_KINDS, Row, read_benchmark
from danceopd.evaluation.gedit.draw import Editing, edit, edit_rows, picture_file, seed_of, size_of
from danceopd.evaluation.pipelines import load_pipeline
from danceopd.support.errors import UserError
from danceopd.support.ranks import Ranks


@pytest.fixture(scope="module")
def pipeline(root):
    return load_pipeline(root / "model")


@given(st.integers(16, 4000), st.integers(16, 4000), st.sampled_from([16, 32]))
def test_an_edit_has_the_shape_of_its_source(width, height, multiple):
    high, wide = size_of(Image.new("L", (width, height)), 1024, multiple)
    assert high % multiple == wide % multiple == 0
    if 0.25 < width / height < 4:
        assert wide / high == pytest.approx(width / height, rel=0.05)
        assert wide * high == pytest.approx(1024 * 1024, rel=0.05)


def test_seeds_are_of_the_row_and_the_seed_alone():
    rows = [Row(key, kind, language, "", None, 0) for key in "ab" for kind in KINDS for language in ("en", "cn")]
    seeds = [seed_of(row, seed) for row in rows for seed in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert seed_of(Row("a", KINDS[0], "en", "other", True, 9), 0) == seeds[0]


def test_edits_are_the_plain_pipelines_in_the_official_layout(root, pipeline, tmp_path):
    benchmark = read_benchmark(root / "benchmark", PAPER_KINDS[:1], ("en", "cn"))
    edit_rows(benchmark, benchmark.rows, tmp_path, pipeline, 16, EDITING)
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert written == sorted(f"fullset/{row.kind}/{row.language}/{row.key}.png" for row in benchmark.rows)
    row = benchmark.rows[1]
    source = benchmark.picture(row)
    height, width = size_of(source, SIZE, 16)
    plain = FluxKontextPipeline.from_pretrained(root / "model")
    expected = plain(
        image=source.resize((width, height), Image.Resampling.LANCZOS),
        prompt=row.instruction,
        height=height,
        width=width,
        max_area=height * width,
        _auto_resize=False,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(seed_of(row, 0)),
    ).images[0]
    assert expected.size == (width, height)
    assert np.array_equal(Image.open(picture_file(tmp_path, row)), expected)


def test_a_stopped_run_goes_on_and_any_number_of_ranks_draws_the_same(root, pipeline, tmp_path):
    benchmark = read_benchmark(root / "benchmark", PAPER_KINDS[:4])
    edit_rows(benchmark, benchmark.rows, tmp_path / "one", pipeline, 16, EDITING)
    for rank in (2, 0, 1):  # in any order
        own = [benchmark.rows[i] for i in Ranks(rank, 3).slots(len(benchmark.rows))]
        edit_rows(benchmark, own, tmp_path / "three", pipeline, 16, EDITING)
    bytes_of = {row: picture_file(tmp_path / "one", row).read_bytes() for row in benchmark.rows}
    assert bytes_of == {row: picture_file(tmp_path / "three", row).read_bytes() for row in benchmark.rows}
    assert len(set(bytes_of.values())) == len(bytes_of)
    picture_file(tmp_path / "one", benchmark.rows[2]).unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.png")}
    edit_rows(benchmark, benchmark.rows, tmp_path / "one", pipeline, 16, EDITING)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert picture_file(tmp_path / "one", benchmark.rows[2]).read_bytes() == bytes_of[benchmark.rows[2]]


@pytest.mark.parametrize("family", ["klein", "qwen", "kontext"])
def test_every_family_edits_and_takes_a_guidance_scale(family, root, tmp_path, monkeypatch):
    if family == "klein":
        model = tiny_flux2.save_tiny(tmp_path / "model")
    elif family == "qwen":
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

        monkeypatch.setattr(module, "VAE_IMAGE_SIZE", 64 * 64)  # of the references: its own constant, large for a CPU
        monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", 64 * 64)
        model = tiny_qwen_image.save_tiny(tmp_path / "model", edit=True)
    else:
        model = root / "model"
    pipeline = load_pipeline(model)
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    drawn = [
        np.asarray(edit(pipeline, source, "a red cup", (64, 96), 7, Editing(SIZE, 2, scale))) for scale in (1.5, 6)
    ]
    assert drawn[0].shape == (64, 96, 3)
    assert not np.array_equal(drawn[0], drawn[1])
    if family == "qwen":  # its noise levels, scaled to their released last one, do not exist for one step
        with pytest.raises(UserError, match="no finite numbers"):
            edit(pipeline, source, "a red cup", (64, 96), 7, Editing(SIZE, 1))


def test_a_lora_is_as_the_plain_pipeline_loads_it(root):
    source, args = Image.new("RGB", (32, 32), "green"), ("a cup", (32, 32), 3, EDITING)
    with_lora = np.asarray(edit(load_pipeline(root / "model", root / "run" / "student"), source, *args))
    plain = FluxKontextPipeline.from_pretrained(root / "model")
    base = np.asarray(edit(plain, source, *args))
    plain.load_lora_weights(root / "run" / "student")
    assert np.array_equal(with_lora, np.asarray(edit(plain, source, *args)))
    assert not np.array_equal(with_lora, base)
