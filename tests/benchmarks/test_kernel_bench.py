"""benchmarks/kernel_bench.py at a size where it takes a second."""

import json


def test_kernels(tmp_path):
    from benchmarks import kernel_bench

    options = ["--shape", "2", "4", "32", "32", "--dtypes", "float32", "--rounds", "2", "--no-compile"]
    result = kernel_bench.main([*options, "--only", "euler", "--json", str(tmp_path / "a.json")])
    assert [(row["name"], row["settings"]["by"]) for row in result["rows"]] == [
        (name, by) for name in ("euler_step_, guided", "euler_step_") for by in ("ours", "eager")
    ]
    assert all(row["share_of_roofline"] > 0 for row in result["rows"])
    assert json.loads((tmp_path / "a.json").read_text())["latents"] == [2, 4, 32, 32]
