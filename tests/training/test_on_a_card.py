"""What a run does on a card, the picture world's and a model's; each test that can runs on the CPU too."""

import gc
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kernel_device import devices
from model_runs import config_of as model_config
from out_of_memory import Full
from torch.nn.attention import SDPBackend, sdpa_kernel
from world_runs import config_of

from danceopd.api import builder_of
from danceopd.core.rollout import rollout
from danceopd.support.errors import UserError
from danceopd.training.checkpoints import load_newest, save_state
from danceopd.training.loop import Trainer
from danceopd.training.resume import go_on, state_of
from danceopd.training.rollouts.static import StaticField

ROOT = Path(__file__).parents[2]
EACH = [pytest.param(d, marks=pytest.mark.gpu) if d == "cuda" else d for d in devices()]
on_each = pytest.mark.parametrize("device", EACH)
CUDA = torch.cuda.is_available()


def on_a_card(test):
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="no CUDA device")(test))


def trainer_of(config):
    return Trainer(config, builder_of(config)(config))


def records(trainer, updates):
    return [trainer.update() for _ in range(updates)]


def near(found, expected):
    """On a card sums may be in another order."""
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if CUDA else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)


def states(trainer, field):
    """A batch's rollouts by a field, all indices."""
    batch = trainer.draw()
    until = torch.full((len(batch), 1), len(trainer.sigmas) - 1)
    with torch.no_grad():
        return rollout(field, batch.noise, batch.conditioning, trainer.sigmas, until)[0]


def graphs(trainer):
    """Lists the graphs themselves, so that one that was captured again is another."""
    return [graph for program in trainer.student.programs.values() for graph, _ in program.graphs.values()]


@contextmanager
def one_order():
    """Makes a card add up in one order, so that a run twice is the same to the bit."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@on_each
@pytest.mark.parametrize("changes", [{}, {"cuda_graphs": True}, {"precision": "bf16"}], ids=["plain", "graphs", "bf16"])
def test_a_run_twice_is_one_run_and_a_resumed_one_too(raw, tmp_path, device, changes):
    config = config_of(raw, device=device, **changes)
    with one_order():
        whole, again, resumed = (trainer_of(config) for _ in range(3))
        first = records(whole, 2)
        save_state(tmp_path, whole.step, *whole.engine.tensors(), state_of(whole), 1)
        first += records(whole, 2)
        second = records(again, 4)
        go_on(resumed, load_newest(tmp_path)[0])
        third = records(resumed, 2)
    losses = [[record["loss"] for record in run] for run in (first, second, third)]
    assert losses[0] == losses[1]
    assert losses[0][2:] == losses[2]


@on_each
@pytest.mark.parametrize("precision", [None, "bf16", "fp8"])
def test_a_rollout_after_an_optimizers_step_is_of_the_new_weights(raw, device, precision):
    """Replayed where it was captured before the step."""
    trainer = trainer_of(config_of(raw, device=device, cuda_graphs=True, rollout_precision=precision))
    assert isinstance(trainer.student, StaticField)
    before = states(trainer, trainer.student)
    made = graphs(trainer)
    for parameter in trainer.engine.student.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.engine.step(0.01)
    found, expected = states(trainer, trainer.student), states(trainer, trainer.student.field)
    near(found, expected)
    assert float((found - before).abs().max()) > 1e-3
    if device == "cuda":
        assert trainer.student.reason is None
        assert made
        assert graphs(trainer) == made


@on_a_card
@pytest.mark.parametrize(("precision", "family"), [(None, "sd3"), ("fp8", "sd3"), ("bf16", "flux")])
def test_lora_sources_and_replicas_under_graphs(places, precision, family):
    training = {"training.device": "cuda", "training.rollout_precision": precision}
    if family == "flux":
        training |= {f"{key}.embedded_guidance": 3.5 for key in ("student", "sources.one", "sources.two")}
    captured, plain = (
        trainer_of(model_config(places(family), **training | {"training.cuda_graphs": graphs}))
        for graphs in (True, False)
    )
    losses = [[record["loss"] for record in records(trainer, 3)] for trainer in (captured, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    holders = list(captured.rows.pool.holders)
    assert len(holders) == 3  # the student's rollouts, its forward and backward, and the sources, which share a network
    assert [holder.reason for holder in holders] == [None] * 3
    assert graphs(captured)


@on_a_card
def test_a_thousand_replays_are_one(raw):
    trainer = trainer_of(config_of(raw, device="cuda", cuda_graphs=True))
    expected = states(trainer, trainer.student)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000 // (len(trainer.sigmas) - 1)):
        found = states(trainer, trainer.student)
    assert torch.equal(found, expected)
    del found
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == held


@on_a_card
@pytest.mark.parametrize("captured", [False, True])
def test_fifty_updates_take_no_memory(raw, captured):
    trainer = trainer_of(config_of(raw, device="cuda", cuda_graphs=captured))
    held = []
    for _ in range(4):  # the optimizer's states and every graph are made
        records(trainer, 5)
    for _ in range(2):
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
        records(trainer, 50)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held[0] + 2**20


@on_each
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("phase", ["rollout", "query", "match", "backward"])
def test_where_memory_runs_out_in_a_phase_it_gives_up_graphs_and_then_takes_less(raw, device, phase, captured, capsys):
    config = config_of(raw, device=device, cuda_graphs=captured)
    parts, plain = builder_of(config)(config), trainer_of(config)
    network = parts.fields[0] if phase == "query" else parts.student
    network.forward = Full(network.forward, device, phase, 1)
    trainer = Trainer(config, parts)
    for _ in range(2):
        found, expected = trainer.update(), plain.update()
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
        assert found["network_evaluations"] == expected["network_evaluations"]
    said = capsys.readouterr().err
    if captured and device == "cuda":
        assert said.count("the run goes on without CUDA graphs: memory ran out") == 1
        assert "warning" not in said
        return
    if captured and phase == "query":  # asked without buffers, which fits
        assert "warning" not in said
        return
    less = "going on in 2 micro-batches" if phase in ("match", "backward") else "did not fit; going on with"
    assert less in said
    assert said.count("warning") == 1


@on_each
@pytest.mark.parametrize(("phase", "place"), [("match", "match"), ("step", "update")])
def test_where_no_less_can_be_taken_a_run_ends_with_what_to_set(raw, device, phase, place, tmp_path):
    config = config_of(raw, device=device, output_dir=str(tmp_path), save_every=1)
    Trainer(config, builder_of(config)(config)).save()
    parts = builder_of(config)(config)
    trainer = Trainer(config, parts)
    if phase == "match":
        parts.student.forward = Full(parts.student.forward, device, "match", times=99, fits=0)
    else:
        full = Full(None, device, "step", times=1)
        trainer.engine.optimizers[0].step = lambda: full.ask(2)
    with pytest.raises(UserError, match=f"memory ran out in the {place} of step 0") as found:
        trainer.run()
    assert re.search(r"To take less, set training\.batch_size: \d+ in another training\.output_dir", str(found.value))
    assert f"the newest checkpoint is {tmp_path / 'checkpoints' / 'step-'}" in str(found.value)


@on_a_card
def test_zero_3_on_one_rank_is_a_run_alone(raw, tmp_path):
    """By NCCL, in a process of its own."""
    pytest.importorskip("deepspeed")
    import json

    import yaml

    raw["training"] |= {"max_steps": 2, "device": "cuda"}
    losses = []
    for name, more in (("alone", []), ("sharded", ["--deepspeed", str(tmp_path / "zero.json")])):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
        raw["training"]["output_dir"] = str(tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "danceopd", "train", "--config", str(tmp_path / f"{name}.yaml"), *more]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True)
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in lines if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
