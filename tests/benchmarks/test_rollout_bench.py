"""benchmarks/rollout_bench.py at a size where it takes a second."""

import json

import pytest

from benchmarks import networks, rollout_bench


@pytest.mark.parametrize("model", ["world", "sd3"])
def test_rollouts_of_every_variant(model, monkeypatch, tmp_path, capsys):
    if model == "sd3":
        pytest.importorskip("diffusers")
    monkeypatch.setattr(rollout_bench, "STEPS", 4)
    monkeypatch.setattr(networks, "SD3_TEXT", 4)
    variants = ["full", "depth", "depth+static", "depth+bf16", "full+fp8"]
    options = ["--model", model, "--batch", "2", "--resolution", "32", "--guidance", "1", "3", "--rounds", "1"]
    files = [
        "--json",
        str(tmp_path / "a.json"),
        "--plot",
        str(tmp_path / "a.png"),
        "--profile",
        str(tmp_path / "traces"),
    ]
    rollout_bench.main([*options, "--variants", *variants, *files])
    result = json.loads((tmp_path / "a.json").read_text())
    assert [(row["name"], row["settings"]["guidance"]) for row in result["rows"]] == [
        (name, scale) for scale in (1.0, 3.0) for name in variants
    ]
    plain, guided = result["rows"][:5], result["rows"][5:]
    assert [row["evaluations_per_sample"] for row in plain[::4]] == [4, 4]
    assert [row["evaluations_per_sample"] for row in guided[::4]] == [8, 8]
    assert plain[1]["evaluations_per_sample"] == plain[2]["evaluations_per_sample"] < 4
    assert all(row["flops"] > 0 and row["peak_bytes"] > 0 for row in result["rows"])
    over = {kind["rollout"]: kind["over_least"] for kind in result["evaluations"]}
    assert over["K = 1, low_t"] == over["K = 4, low_t"] == over["SDE"] == 1.0
    assert over["K = 1, low_t, static steps"] < 1.03
    assert len(list((tmp_path / "traces").iterdir())) == 10
    assert "K = 4, low_t" in capsys.readouterr().out


def test_rollouts_of_unknown_variants_are_refused(capsys):
    with pytest.raises(SystemExit):
        rollout_bench.main(["--variants", "depth+fast"])
    assert "'depth+fast' is not full or depth" in capsys.readouterr().err
