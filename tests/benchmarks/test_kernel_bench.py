"""benchmarks/kernel_bench.py at a size where it takes a second."""

import json

import pytest
import torch

from benchmarks import common


def test_kernels(tmp_path):
    from benchmarks import kernel_bench

    options = ["--shape", "2", "4", "32", "32", "--dtypes", "float32", "--rounds", "2", "--no-compile"]
    result = kernel_bench.main([*options, "--only", "euler", "--json", str(tmp_path / "a.json")])
    assert [(row["name"], row["settings"]["by"]) for row in result["rows"]] == [
        (name, by) for name in ("euler_step_, guided", "euler_step_") for by in ("ours", "eager")
    ]
    assert all(row["share_of_roofline"] > 0 for row in result["rows"])
    assert json.loads((tmp_path / "a.json").read_text())["latents"] == [2, 4, 32, 32]


def test_on_a_card_no_tensor_fits_into_the_cache(monkeypatch):
    from benchmarks import kernel_bench

    assert kernel_bench.large_shape() == (8, 16, 128, 128) or common.device().type == "cuda"
    monkeypatch.setattr(common, "device", lambda: torch.device("cuda"))
    for cache in (6 * 2**20, 50 * 2**20, 126 * 2**20):
        monkeypatch.setattr(common, "cache_bytes", lambda cache=cache: cache)
        shape = kernel_bench.large_shape()
        numbers = torch.Size(shape).numel()
        assert 2 * numbers >= 2 * cache  # of bfloat16, two bytes each
        assert numbers <= max(8 * 16 * 128 * 128, cache + 16 * 128 * 128)


def test_as_typed_it_measures_less_than_all(monkeypatch):
    from benchmarks import kernel_bench

    measured = []
    monkeypatch.setattr(kernel_bench, "measure", lambda case, copy, copied, settings, args: measured.append(
        (settings["dtype"], args.full, args.rounds)) or [])  # fmt: skip
    monkeypatch.setattr(common, "finish", lambda result, args: result)
    for options, dtypes, rounds in (([], ["float32", "bfloat16"], 5), (["--full"], list(kernel_bench.DTYPES), 15)):
        measured.clear()
        kernel_bench.main(["--shape", "2", "4", "8", "8", *options])
        assert list(dict.fromkeys(dtype for dtype, *_ in measured)) == dtypes
        assert {(full, n) for _, full, n in measured} == {(bool(options), rounds)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_every_case_can_be_replayed(name):
    from benchmarks import kernel_bench

    for case in kernel_bench.cases((4, 16, 32, 32), getattr(torch, name), "cuda"):
        for backend in (None, "torch"):
            replay = common.replayed(lambda: case.run(backend))  # noqa: B023
            for _ in range(3):
                replay()
        torch.cuda.synchronize()
