"""DeepSpeed's ranks on diffusers models: two processes on the CPU draw and train what one does."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_flux2
import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel, SD3Transformer2DModel
from model_runs import teachers_config
from PIL import Image
from zero_models_ranks import run

from danceopd.data.prepare import prepare
from danceopd.tools.export import export

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[3]
MAKING = ROOT / "tests" / "making"
STEPS = 5
T2I, EDIT, NOBODY = 0, 1, 2
# By slot; the first half of a batch is rank 0's.
PATTERN = [
    [EDIT, EDIT, T2I, T2I],
    [T2I, T2I, EDIT, EDIT],
    [EDIT, T2I, T2I, T2I],
    [T2I, T2I, T2I, T2I],
    [EDIT, EDIT, EDIT, EDIT],
]


def launch(folder, jobs, size=2, seconds=300):
    """Run jobs on ranks; what they said."""
    folder.mkdir(parents=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return started(folder, "zero_models_ranks.py", folder / "jobs.json", size, seconds)[0]


def started(folder, script, argument, size=2, seconds=300):
    """What each of the ranks said that run a script of tests/making."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", MAKING, ROOT / "tests" / "backbones")))
    common = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": paths}
    common |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    processes, logs = [], [folder / f"rank-{rank}.txt" for rank in range(size)]
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
        command = [sys.executable, str(MAKING / script), str(argument)]
        with open(log, "w") as file:
            processes.append(
                subprocess.Popen(command, env=os.environ | common | own, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        statuses = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [log.read_text() for log in logs]
    assert statuses == [0] * size, "\n".join(text[-3000:] for text in said)
    return said


def curve(folder):
    records = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def flux2_place(tmp_path_factory):
    """A model that draws and edits, two others of its kind, and prepared rows."""
    root = tmp_path_factory.mktemp("flux2")
    model = tiny_flux2.save_tiny(root / "model")
    for seed, name in ((1, "one"), (2, "two")):
        other = Flux2Transformer2DModel.from_pretrained(model / "transformer")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.1 * p.std().nan_to_num(0.0))
        other.save_pretrained(root / name)
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        row = {"id": str(i), "task": ("t2i", "edit")[i % 2], "prompt": f"a picture of {'cups ' * i}"}
        if i % 2:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"{i}.png")
            row["source_image"] = f"{i}.png"
        rows.append(row)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(root / "rows.jsonl", model, root / "cache", resolution=32)
    return root


def training_of(folder, **training):
    return {
        "output_dir": str(folder),
        "device": "cpu",
        "max_steps": STEPS,
        "batch_size": 4,
        "learning_rate": 2e-3,
        "warmup_steps": 1,
        "ema_decay": 0.5,
        "log_every": 1,
        "sample_every": 0,
        **training,
    }


def full(root, folder, **training):
    """A student of all weights, and three sources: the model itself, which may be asked, and two others."""
    rows = {"prepared": str(root / "cache" / "rows.jsonl")}
    return {
        "model": str(root / "model"),
        "sources": {"t2i": {"weights": str(root / "one")}, "edit": {"weights": str(root / "two")}, "base": {}},
        "capabilities": {
            "t2i": {"source": "t2i", "task": "t2i", "data": rows},
            "edit": {"source": "edit", "task": "edit", "data": rows},
            "nobody": {"source": "base", "task": "t2i", "data": rows, "capability": "t2i"},
        },
        "rollout": {"num_inference_steps": 4},
        "query": {"bias": "uniform"},
        "training": training_of(folder, **training),
    }


@pytest.fixture(scope="module")
def sd3_place(prepared_places):
    return prepared_places("sd3")


def lora(root, folder, **training):
    training = training_of(folder, learning_rate=2e-2, **training)
    return teachers_config(root, folder, **{f"training.{key}": value for key, value in training.items()}).to_dict()


def stage(number, **zero):
    return {"zero_optimization": {"stage": number, **zero}}


def alone(folder, job):
    """The losses of one process without DeepSpeed."""
    own = job["config"] | {"training": job["config"]["training"] | {"output_dir": str(folder)}}
    run(job | {"config": own})
    return curve(folder)


def equal(job, losses, tolerance=1e-4):
    found = curve(job["config"]["training"]["output_dir"])
    assert len(found) == STEPS
    np.testing.assert_allclose(found, losses, rtol=0, atol=tolerance * max(losses), err_msg=job["name"])


SHARDED = {"stage3_param_persistence_threshold": 0}  # tiny parameters are sharded too


@pytest.fixture(scope="module")
def ran(sd3_place, flux2_place, tmp_path_factory):
    """(folder, jobs by name, what rank 0 said) of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    adapter = lora(sd3_place, folder / "adapter", batch_size=4, gradient_checkpointing=True)
    shards = {"rollout_on": "shards", "shard_sources": True, "gradient_checkpointing": True}
    jobs = [
        {"name": "adapter", "config": adapter, "settings": stage(3, **SHARDED)},
        {"name": "replica", "config": full(flux2_place, folder / "replica"), "routes": PATTERN, "settings": stage(3)},
        {
            "name": "shards",
            "config": full(flux2_place, folder / "shards", **shards),
            "routes": PATTERN,
            "settings": stage(3, **SHARDED),
        },
    ]
    return folder, {job["name"]: job for job in jobs}, launch(folder / "launch", jobs)


def test_two_ranks_train_what_one_process_does(ran, tmp_path):
    _, jobs, said = ran
    equal(jobs["adapter"], alone(tmp_path / "adapter", jobs["adapter"]))
    losses = alone(tmp_path / "full", jobs["replica"])
    for name in ("replica", "shards"):
        equal(jobs[name], losses)
    assert re.search(r"2 sources of \d+\.\d\d [KM]iB lie whole on each rank", said)
    assert re.search(r"2 sources of \d+\.\d\d [KM]iB lie in 2 shards", said)
    assert "rollouts run on a replica" in said
    assert "rollouts run on the shards" in said


def test_one_process_goes_on_and_plain_diffusers_loads_it(ran, flux2_place, sd3_place, tmp_path):
    folder, jobs, _ = ran
    for name, place in (("shards", flux2_place), ("adapter", sd3_place)):
        job = jobs[name]
        job["config"]["training"]["max_steps"] = STEPS + 1
        run(job)
        assert len(curve(folder / name)) == STEPS + 1
        output = export_to(folder / name, tmp_path / name)
        pipeline = DiffusionPipeline.from_pretrained(place / "model")
        before = {key: value.clone() for key, value in pipeline.transformer.state_dict().items()}
        if name == "adapter":
            pipeline.load_lora_weights(output)
        else:
            pipeline.transformer = Flux2Transformer2DModel.from_pretrained(output)
            assert any(not torch.equal(before[key], value) for key, value in pipeline.transformer.state_dict().items())
        size = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
        assert np.isfinite(pipeline(prompt="a cup", **size).images).all()


def export_to(run, output):
    export(run, output)
    return output


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_and_precision(sd3_place, flux2_place, tmp_path):
    kinds = {"adapter": (lora, sd3_place, None), "full": (full, flux2_place, PATTERN)}
    jobs = [
        {
            "name": f"{kind}-{number}-{precision}",
            "kind": f"{kind}-{precision}",
            "config": make(place, tmp_path / f"{kind}-{number}-{precision}", batch_size=4, precision=precision),
            "routes": pattern,
            "settings": stage(number),
        }
        for kind, (make, place, pattern) in kinds.items()
        for number in (0, 1, 2, 3)
        for precision in ("fp32", "bf16")
    ]
    host = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    for kind, (make, place, pattern) in kinds.items():
        config = make(place, tmp_path / f"{kind}-host", batch_size=4)
        job = {"name": f"{kind}-host", "kind": f"{kind}-fp32", "config": config, "routes": pattern}
        jobs.append(job | {"settings": stage(3, **host)})
    accumulated = full(flux2_place, tmp_path / "parts", gradient_accumulation_steps=2, rollout_on="shards")
    jobs.append(
        {
            "name": "parts",
            "kind": "full-fp32",
            "config": accumulated,
            "routes": PATTERN,
            "settings": stage(3, **SHARDED),
        }
    )
    drawn = full(flux2_place, tmp_path / "drawn", rollout_on="shards", sample_every=2)
    mixed = stage(3, stage3_param_persistence_threshold=2000)  # some stay gathered, some do not
    jobs.append({"name": "drawn", "kind": "drawn-fp32", "config": drawn, "routes": PATTERN, "settings": mixed})
    launch(tmp_path / "launch", jobs, seconds=1800)
    losses = {}
    for job in jobs:
        if job["kind"] not in losses:
            losses[job["kind"]] = alone(tmp_path / "alone" / job["kind"], job)
        # Products of bf16 round another way in batches of another size.
        equal(job, losses[job["kind"]], 1e-4 if job["kind"].endswith("fp32") else 3e-2)
    pictures = sorted((tmp_path / "drawn" / "samples").glob("*.png"))
    assert len(pictures) == 3
    for path in pictures:  # the average was put in the student's place for them, and the student back
        drawn, lone = (
            np.asarray(Image.open(p), dtype=int) for p in (path, tmp_path / "alone/drawn-fp32/samples" / path.name)
        )
        assert abs(drawn - lone).max() <= 1  # weights that differ by rounding


def test_no_rank_holds_the_whole_while_a_model_is_built(tmp_path, monkeypatch):
    """74 M parameters in 294 MB: a rank's memory grows by its half and by what making it takes."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system at once
    heads = {"attention_head_dim": 64, "num_attention_heads": 8, "caption_projection_dim": 512}
    model = SD3Transformer2DModel(num_layers=8, joint_attention_dim=64, pooled_projection_dim=64, **heads)
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "transformer", max_shard_size="50MB")
    del model
    for said in started(tmp_path, "zero_load_ranks.py", tmp_path / "transformer"):
        held, grown = map(int, re.search(r"held (\d+) grown (\d+)", said).groups())
        assert held == pytest.approx(4 * parameters / 2, rel=0.01)
        assert grown < 0.8 * 4 * parameters
