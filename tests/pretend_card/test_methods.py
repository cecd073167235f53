"""Every method on the pretend card: the CPU's numbers bit for bit, and one wait of the host in an update."""

import pytest
from card_runs import BEGINS, EAGER, compared, plain_kernels, same, state_of, told, trainer_on, world_config
from pretend_card import WrongSide, pretend_card

from danceopd.core.methods import METHODS
from danceopd.training.checkpoints import load_newest
from danceopd.training.resume import go_on
from danceopd.world.build import build

VARIANTS = {
    "danceopd": {},
    "danceopd eager": EAGER,
    "danceopd heun, k, parts": {
        "rollout": {"solver": "heun"},
        "query": {"k": 2},
        "training": {"gradient_accumulation_steps": 3, "cuda_graphs": False},
    },
    "danceopd ab2, adamw": {"rollout": {"solver": "ab2"}, "training": {"optimizer": "adamw"}},
    "danceopd adaptive, gap": {"route": "adaptive", "query": {"bias": "gap"}, **EAGER},
    "danceopd soft, clean": {"options": {"routing": "soft", "objective": "clean"}, "route": "round_robin"},
    "danceopd bf16": {"training": {"precision": "bf16"}},
    "danceopd bf16 replica": {"training": {"rollout_precision": "bf16"}},
    "danceopd_fast": {"options": {"warm_start": 0.1}},
    "joint": {},
    "off_policy": {},
    "off_policy sources": {"options": {"states_from": "sources"}},
    "diffusion_opd": {"route": "round_robin"},
    "flow_opd": {"options": {"group_size": 2, "anchor_weight": 0.1, "detach_advantage": False}},
    "consistency": {},
    "sds": {},
    "dmd": {},
    "pooled": {"options": {"visits": 2}},
}
SLOW = {"danceopd soft, clean", "off_policy sources", "danceopd_fast", "danceopd bf16 replica", "diffusion_opd"}


def test_every_method_has_a_variant():
    assert {name.split()[0] for name in VARIANTS} == set(METHODS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VARIANTS])
def test_a_method_is_the_same_on_the_card_and_waits_once(networks, tmp_path, name):
    compared(world_config(networks, tmp_path, method=name.split()[0], **VARIANTS[name]), build)


def test_guided_students_and_sources_are_the_same_and_wait_once(networks, tmp_path):
    guided = {
        "capabilities": {
            "t2i": {
                "source": "one",
                "task": "t2i",
                "data": {"world": "t2i", "size": 8},
                "student_guidance_scale": 2.0,
            }
        },
        "sources": {"two": {"weights": str(networks / "two.safetensors"), "guidance_scale": 3.0}},
    }
    compared(world_config(networks, tmp_path, **guided), build)


def test_a_run_goes_from_the_card_to_the_cpu_and_back(networks, tmp_path):
    with plain_kernels():
        config = world_config(networks, tmp_path / "whole")
        whole = trainer_on("cpu", config, build)
        records = [told(whole.update()) for _ in range(3)]
        found = []
        for device in ("card:0", "cpu", "card:0"):
            with pretend_card():
                trainer = trainer_on(device, world_config(networks, tmp_path / "parts"), build)
                checkpoint, _ = load_newest(tmp_path / "parts" / "checkpoints")
                if checkpoint is not None:
                    go_on(trainer, checkpoint)
                found.append(told(trainer.update()))
                trainer.save()
                state = state_of(trainer)
    assert found == records
    same(state_of(whole), state)


def test_previews_are_drawn_on_the_card(networks, tmp_path):
    with plain_kernels():
        config = world_config(networks, tmp_path)
        trainer_on("cpu", config, build).previews.write(tmp_path / "cpu.png", trainer_on("cpu", config, build).student)
        with pretend_card():
            trainer = trainer_on("card:0", config, build)
            trainer.previews.write(tmp_path / "card.png", trainer.engine.ema.module)
    assert (tmp_path / "cpu.png").read_bytes() == (tmp_path / "card.png").read_bytes()


def test_the_one_wait_reads_the_norm_and_all_that_is_watched(networks, tmp_path):
    with plain_kernels(), pretend_card() as card:
        trainer = trainer_on("card:0", world_config(networks, tmp_path, **EAGER), build)
        trainer.update()
        card.waits.clear()
        trainer.update()
    (wait,) = card.waits
    assert wait.phase == "step"
    assert wait.line.startswith("danceopd/training/engine.py:")


def test_phases_on_the_card_are_told_without_a_wait(networks, tmp_path):
    with plain_kernels(), pretend_card() as card:
        trainer = trainer_on("card:0", world_config(networks, tmp_path), build)
        found = []
        for _ in range(3):
            card.waits.clear()
            with trainer.speed.phases.update():
                trainer.update()
            found.append(trainer.speed.record(1.0, 6, *trainer.new))
            assert sum(wait.what != BEGINS for wait in card.waits) <= 1, [str(wait) for wait in card.waits]
    names = {"route", "rollout", "query", "match", "backward", "step"}
    # Of an update's step only what the host has waited for is past; the rest is told with the next one.
    assert [names <= record["phases"].keys() for record in found] == [False, True, True]
    assert all(sum(record["phases"].values()) == pytest.approx(1) for record in found)
    assert all(record["peak_memory_gib"] > 0 for record in found)


def test_a_tensor_on_the_wrong_side_fails_with_its_line(networks, tmp_path):
    with plain_kernels(), pretend_card():
        trainer = trainer_on("card:0", world_config(networks, tmp_path, **EAGER), build)
        batch = trainer.draw()
        batch.noise = batch.noise.cpu()
        with pytest.raises(WrongSide, match=r"meet tensors on the CPU.* at danceopd/world/dit\.py:\d+"):
            trainer.ask(batch)
