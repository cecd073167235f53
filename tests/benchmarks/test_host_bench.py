"""The host's time: that a static pass spends a third of what the plain way does, with adapters, sources and FP8."""

import pytest

from benchmarks import host_bench


@pytest.mark.slow
def test_the_host_spends_a_third_in_static_passes():
    result = host_bench.main(["--rounds", "2"])
    ratios = {row["name"]: row["ratio"][1] for row in result["rows"] if row["ratio"]}
    assert set(ratios) == {f"{part}, {p}, static" for part in ("query", "match") for p in ("float32", "fp8")}
    assert min(ratios.values()) >= 3, ratios
