"""danceopd plan: its parts add up, it follows the cards and the settings, and memory is what a run really takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from danceopd.cli.parser import main
from danceopd.config.reading import load_config, parse_config
from danceopd.planning.backward import operations
from danceopd.planning.cluster import LEFT, UTILISATION, Setting, plan
from danceopd.planning.dry_run import dry_run
from danceopd.support.cards import CARDS, gather_seconds
from danceopd.support.memory import GIB, format_bytes
from danceopd.support.texts import format_seconds
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.dry_run import examine
from danceopd.world.files import save_model


def embedded(folder: Path, width: int, depth: int, **training) -> dict:
    """A configuration of the embedded network at other sizes, its student the source."""
    torch.manual_seed(0)
    save_model(DiT(DiTConfig(width=width, depth=depth, heads=width // 64)), folder / "network.safetensors")
    weights = str(folder / "network.safetensors")
    return {
        "student": {"init_from": weights},
        "sources": {"t2i": {"weights": weights}},
        "capabilities": {"t2i": {"source": "t2i", "task": "t2i", "data": {"world": "t2i", "size": 8}}},
        "training": {"output_dir": str(folder / "run"), "batch_size": 4, "sample_every": 0} | training,
    }


def large(n: float, **changes):
    """A plan of the demo, as if its network had n parameters."""
    scaled = plan(
        load_config("configs/demo.yaml", ["training.optimizer=adamw"]),
        examine,
        **({"gpus": 64, "card": "h100"} | changes),
    )
    ratio, found = n / scaled.trained, scaled.findings
    found.parameters["student, trainable"] = int(n)
    for name in ("student", "gradient", "optimizer state", "average (EMA)", "source weights"):
        found.memory[name] = found.memory[name][0] * ratio, ""
    scaled.operations *= ratio
    return scaled


# ---------------------------------------------------------------------------------------------- arithmetic


def test_what_a_small_network_takes_is_said_in_units_that_suit_it():
    said = plan(load_config("configs/demo.yaml"), examine, 8, "h100").text()
    assert not re.search(r"\b0\.0+\b|e-0", said)
    assert re.search(
        r"  student +7\.80 MiB +7\.80 MiB +7\.80 MiB +998\.56 KiB\n", said
    )  # 2,045,056 x 4 bytes, an eighth
    assert re.search(r"\d+ µs an update .*; 1,000 updates: \d+ ms\n", said)
    assert [format_seconds(s) for s in (0, 9.3e-6, 0.0314, 42.4, 100, 7000, 3e5)] == [
        "0 µs", "9.3 µs", "31 ms", "42 s", "1.7 min", "1.9 h", "3.5 days"
    ]  # fmt: skip
    assert [format_bytes(n) for n in (0, 512, 2**20, 3 * 2**29)] == ["0", "0.50 KiB", "1.00 MiB", "1.50 GiB"]


def test_one_process_is_the_dry_run():
    config = load_config("configs/demo.yaml")
    found = plan(config, examine, 1, "h100")
    assert found.estimate(Setting(0)).bytes() == pytest.approx(dry_run(config, examine).total_memory())
    assert [s.stage for s in found.settings()].count(1) == 0


def test_a_hand_count_of_every_stage():
    n, gpus = 2_000_000_000, 64
    scaled = large(n, gpus=gpus)
    terms = [scaled.estimate(Setting(stage)).device for stage in range(4)]
    share = 4 * n / gpus
    assert terms[0]["student"] == terms[0]["gradient"] == 4 * n
    assert terms[0]["optimizer state"] == pytest.approx(8 * n)
    assert [t["average (EMA)"] for t in terms] == [share] * 4
    assert terms[1]["optimizer state"] == pytest.approx(2 * share)
    assert terms[1]["gradient"] == 4 * n + share
    assert terms[2]["gradient"] == 2 * share
    assert terms[3]["student"] == terms[3]["float32 weights of the optimizer"] == share
    assert terms[3]["replica for rollouts"] == 4 * n
    assert terms[3]["gathered at a time"] == 4 * 1e9
    totals = [scaled.estimate(Setting(stage)).bytes() for stage in range(4)]
    assert totals[0] > totals[1] > totals[2]  # and ZeRO 3 has a replica


def test_offload_moves_what_it_says_to_the_host():
    scaled = large(2e9)
    plain, optimizer, everything = (scaled.estimate(Setting(3, offload)) for offload in ("", "optimizer", "all"))
    for moved in (optimizer, everything):
        assert moved.bytes() < plain.bytes()
        assert moved.bytes() + sum(moved.host.values()) <= plain.bytes() * (1 + 1e-9)
        assert moved.time() > plain.time()
    assert "student" in everything.host
    assert "student" in optimizer.device


def test_the_cheapest_that_fits_is_the_fastest_and_fits():
    scaled = large(12e9, gpus=8)
    fitting = scaled.fitting()
    assert fitting
    assert fitting[0].setting.stage == 3 or fitting[0].setting.offload
    assert all(e.bytes() + LEFT <= scaled.card.memory for e in fitting)
    assert fitting[0].time() == pytest.approx(min(e.time() for e in fitting), rel=1e-3)
    assert not large(1e12, gpus=8).fitting()
    assert "nothing fits; the least is" in large(1e12, gpus=8).text()


def test_a_small_network_needs_no_sharding_and_sharded_sources_take_less():
    scaled = large(2e9)
    assert scaled.fitting()[0].setting == Setting(0)
    whole, sharded = (scaled.estimate(Setting(3, sharded=sharded)) for sharded in (False, True))
    assert sharded.device["source weights"] < whole.device["source weights"]
    assert sharded.time() > whole.time()


def test_seconds_of_a_gather_by_hand():
    card = CARDS["h100"]
    assert gather_seconds(8e9, 1, card) == 0
    assert gather_seconds(8e9, 8, card) == pytest.approx(7e9 / 450e9)
    assert gather_seconds(8e9, 64, card) == pytest.approx(max(7e9 / 400e9, 8e9 * 63 / 64 / 450e9))


def test_operations_of_a_forward_by_hand():
    width, depth, text = 128, 3, 10
    config = DiTConfig(width=width, depth=depth, text_length=text)
    with torch.device("meta"):
        network = DiT(config)
    scaled = plan(load_config("configs/demo.yaml"), examine, 1, "h100")
    conditioning = scaled.findings.operations()
    assert set(conditioning) == {"t2i", "edit"}
    assert conditioning["edit"] > conditioning["t2i"]
    from danceopd.core.conditioning import Conditioning

    none = Conditioning(torch.zeros(1, text, dtype=torch.int64), None, torch.tensor([False]))
    tokens, pixels, w = 4 + text, 3 * 16**2, width
    blocks = depth * (6 * w * w + tokens * (3 + 1 + 6) * w * w + 2 * tokens * tokens * w)
    once = (text + 1 + 2 + 2) * w * w  # pooled prompt, time, last modulation
    patches = 4 * (pixels * w + 2 * w * w + 2 * w * pixels)
    assert operations(network, (3, 32, 32), none) == 2 * (blocks + once + patches)


def test_time_is_operations_over_the_stated_share_of_the_peak():
    scaled = large(2e9)
    estimate = scaled.estimate(Setting(0))
    expected = scaled.forwards(False) * scaled.operations / (UTILISATION * 989e12)
    assert estimate.seconds["network evaluations"] == pytest.approx(expected)
    assert plan(load_config("configs/demo.yaml"), examine, 8, "a100").card.operations == 312e12


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_prints_an_estimate_that_says_so(capsys, tmp_path):
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1e6}}))
    argv = ["plan", "--config", "configs/demo.yaml", "--gpus", "8", "--deepspeed", str(settings)]
    assert main([*argv, "training.optimizer=adamw"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("AN ESTIMATE, nothing of it measured: 8 x H100")
    for part in ("ZeRO 3", "replica for rollouts", "network evaluations of a rank", "cheapest setting that fits"):
        assert part in text
    assert "runs in one process" not in text
    assert main(["plan", "--config", "configs/demo.yaml", "--gpus", "256"]) == 0
    text = capsys.readouterr().out
    assert "some have none" in text
    assert "muon runs in one process" in text


def test_the_command_knows_every_card():
    from danceopd.cli import train

    assert tuple(CARDS) == train.CARDS


def test_what_is_missing_is_said(capsys):
    pytest.importorskip("diffusers")
    assert main(["plan", "--config", "configs/models/z-image-c.yaml", "--gpus", "64", "--gpu", "a100"]) == 2
    text = capsys.readouterr().out
    assert "no estimate without the network's configuration" in text
    assert "model: " in text
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--config", "configs/demo.yaml", "--gpus", "0"])
    assert "--gpus: must be at least 1, not 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ against real runs


def peak(folder: Path, config: dict, ranks: int, settings: dict | None) -> int:
    """Bytes that a run of real processes takes at most, as tests/making/plan_peak.py measures them."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    argv = [str(Path(__file__).parents[1] / "making" / "plan_peak.py"), str(folder / "config.yaml")]
    if settings:
        (folder / "zero.json").write_text(json.dumps(settings))
        argv.append(str(folder / "zero.json"))
    if ranks > 1:
        argv = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *argv]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # what is freed goes back, so that the peak is what is in use
    ended = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(next(line for line in ended.stdout.splitlines() if line.startswith('{"peak"')))["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_estimate_is_what_a_run_takes_within_15_percent(tmp_path, ranks):
    pytest.importorskip("deepspeed")
    config = embedded(tmp_path, width=1024, depth=5)
    n = sum(p.numel() for p in DiT(DiTConfig(width=1024, depth=5, heads=16)).parameters())
    assert n > 100e6
    zero = {"stage": 3, "reduce_bucket_size": n // 10, "stage3_max_live_parameters": n // 10}
    zero |= {"stage3_max_reuse_distance": n // 10, "stage3_prefetch_bucket_size": n // 20}
    settings = {"zero_optimization": zero} if ranks > 1 else None
    scaled = plan(parse_config(config), examine, ranks, "h100", settings)
    estimate = scaled.estimate(Setting(3 if ranks > 1 else 0)).bytes()
    measured = peak(tmp_path, config, ranks, settings)
    print(f"{ranks} processes: estimate {estimate / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB")
    assert estimate == pytest.approx(measured, rel=0.15)
