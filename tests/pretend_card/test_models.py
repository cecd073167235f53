"""Model families on the pretend card: the CPU's numbers bit for bit, and how often the host waits."""

import gc

import pytest
from card_runs import compared, on_card, on_cpu, plain_kernels, same, trainer_on
from model_runs import FAMILIES, config_of
from pretend_card import pretend_card

from danceopd.models.eight_bit import stored
from danceopd.models.swapping import ALIVE
from danceopd.training.assembly.build import build_model

SMALL = {
    "rollout.num_inference_steps": 3,
    "training.batch_size": 4,
    "training.max_steps": 4,
    "training.warmup_steps": 0,
    "training.learning_rate": 1e-2,
    "training.ema_decay": 0.5,
}
GUIDED = {
    "sources.two.guidance_scale": 2.0,
    "capabilities.one.student_guidance_scale": 3.0,
}
FULL = {"student": {}, "training.learning_rate": 1e-3}
KINDS = {
    "lora": {},
    "lora guided": GUIDED,
    "lora bf16": {"training.precision": "bf16"},
    "lora fp8": {"training.precision": "bf16", "training.base_precision": "fp8"},
    "lora fp8 rollouts": {"training.precision": "bf16", "training.rollout_precision": "fp8"},
    "lora int8": {"training.precision": "bf16", "training.base_precision": "int8"},
    "all weights": FULL,
    "all weights bf16": FULL | {"training.precision": "bf16"},
    "checkpointing": {"training.gradient_checkpointing": True},
}


def changed(root, tmp_path, **changes):
    own = SMALL | {"training.output_dir": str(tmp_path)} | changes
    if own.pop("student", None) is not None:
        own["student.lora"] = None
    return config_of(root, **own)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in ("lora guided", "lora fp8 rollouts"))) for k in KINDS]
)
def test_flux2_is_the_same_and_waits_once(places, tmp_path, kind):
    compared(changed(places("klein"), tmp_path, **KINDS[kind]), build_model)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "klein"])
def test_a_family_is_the_same(places, tmp_path, family):
    root = places(family)
    embedded = {f"{key}.embedded_guidance": 3.5 for key in ("student", "sources.one", "sources.two")}
    changes = embedded if family in ("flux", "kontext", "flux2") else GUIDED
    compared(changed(root, tmp_path, **changes), build_model)


@pytest.mark.slow
def test_offloaded_sources_are_the_same(places, tmp_path):
    root = places("klein")
    changes = {
        "sources.two": {"weights": str(root / "other")},
        "training.offload_sources": True,
    }
    config = changed(root, tmp_path, **changes)
    records, state = on_cpu(config, build_model, 2)
    there, found, waits, _ = on_card(config, build_model, 2)
    assert there == records
    same(state, found)
    assert waits  # a block at a time


SWAP = {"training.gradient_checkpointing": True, "training.swap_blocks": 4, "training.cuda_graphs": False}


def peak_of_an_update(config) -> tuple[int, list[int]]:
    """The most bytes on the card in a second update, and those of each block that waits in host memory."""
    gc.collect()  # what other trainers have left on the card
    with plain_kernels(), pretend_card() as card:
        before = card.module.allocated
        trainer = trainer_on("card:0", config, build_model)
        trainer.update()
        card.module.reset_peak_memory_stats()
        trainer.update()
        swap = trainer.parts.student._shared[0].swap
        assert swap is None or swap.alive() <= ALIVE
        peak, waiting = card.module.peak - before, swap._slots if swap else []
        return peak, [sum(part.nbytes for slot in slots for part in stored(slot.host)) for slots in waiting]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lora int8"])
def test_waiting_blocks_are_the_same_and_leave_the_card(places, tmp_path, kind):
    """The card raises a race where a block is read in a stream that has not waited for its copy."""
    config = changed(places("klein"), tmp_path, **KINDS[kind], **SWAP)
    compared(config, build_model)
    peak, sizes = peak_of_an_update(config)
    without = SWAP | {"training.swap_blocks": None}
    whole, _ = peak_of_an_update(changed(places("klein"), tmp_path, **KINDS[kind], **without))
    assert whole - peak > 0.95 * (sum(sizes) - sum(sorted(sizes)[-ALIVE:]))
