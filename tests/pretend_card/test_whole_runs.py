"""Whole runs on the pretend card, from the first update to the report: what they leave behind is the CPU's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from card_runs import plain_kernels, same, told, world_config
from pretend_card import ROOT, pretend_card
from world_runs import write_networks

from danceopd.training.assembly import room
from danceopd.training.loop import train
from danceopd.world.build import build
from danceopd.world.dit import DiTConfig
from danceopd.world.evaluate import evaluate_run


def run_on(device, config, monkeypatch):
    """Trains a run on a device that no configuration can name, and evaluates it."""
    with plain_kernels(), pretend_card(), monkeypatch.context() as patch:
        patch.setattr(room, "find_device", lambda _: torch.device(device))
        folder = train(config, build)
    return folder, evaluate_run(folder)


@pytest.mark.slow
def test_scores_previews_and_report_are_the_cpus(networks, tmp_path, monkeypatch):
    few = {"times": 2, "quick": 1, "per_task": 1, "per_kind": 1, "num_inference_steps": 2}
    left = []
    for device in ("cpu", "card:0"):
        training = {"output_dir": str(tmp_path / device[:4]), "max_steps": 4, "sample_every": 2, "save_every": 2}
        training |= {"log_every": 1, "cuda_graphs": True}
        config = world_config(networks, tmp_path, training=training, evaluation=few)
        folder, results = run_on(device, config, monkeypatch)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        updates = [told(line) for line in lines if "loss" in line]
        scores = [line["evaluation"] for line in lines if "evaluation" in line]
        pictures = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
        page = re.findall(r"data:image/png;base64,[^\"')]+", (folder / "report.html").read_text())
        weights = (folder / "student.safetensors").read_bytes()
        left.append((updates, scores, results["rows"], pictures, page, weights))
    updates, scores, _, pictures, page, _ = left[0]
    assert len(updates) == 4
    assert scores
    assert pictures
    assert page
    for on_cpu, on_card in zip(*left, strict=True):
        assert on_cpu == on_card


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_on_one_rank_is_the_cpus(tmp_path, stage):
    """Its step reads the norm and the overflow on the host, in DeepSpeed's own code; nothing else waits."""
    pytest.importorskip("deepspeed")
    write_networks(tmp_path, sizes=DiTConfig(width=16, depth=1, heads=2, mlp_ratio=1))
    folders = [ROOT, ROOT / "kernels", *(ROOT / "tests" / name for name in ("pretend_card", "making"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    found = []
    for device in ("cpu", "card"):
        command = [sys.executable, str(Path(__file__).with_name("zero_run.py")), device, str(stage), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads((tmp_path / f"{device}.json").read_text()))
    on_cpu, on_card = found
    assert on_card["records"] == on_cpu["records"]
    same(*(torch.load(tmp_path / f"{device}.pt", weights_only=True) for device in ("cpu", "card")))
    assert all(line.endswith("[step]") for line in on_card["waits"])
    assert len(on_card["waits"]) <= 6
