"""The estimate of memory against the most that real updates take, by the allocator's record on the CPU."""

import pytest
from model_runs import config_of
from update_peak import update_peak, wide_place

from danceopd.planning.dry_run import dry_run
from danceopd.planning.memory import STEP
from danceopd.planning.models import examine

# Every family's transformer; those of two pipelines once for each kind of rows.
KINDS = {
    "sd3": "t2i",
    "flux": "t2i",
    "kontext": "edit",
    "klein": "t2i",
    "flux2": "edit",
    "qwen": "t2i",
    "qwen_edit": "edit",
    "qwen_21": "t2i",
    "z": "t2i",
    "z_omni": "edit",
    "longcat": "t2i",
    "longcat_edit": "edit",
    "krea2": "t2i",
    "prx": "t2i",
    "dreamlite": "edit",
    "flux3": "edit",
}

# Heads of 16, layers of each kind, pixels of a side, tokens of a prompt; and what else is another from size to size.
SIZES = {
    "small": ((8, 2, 192, 32), {}),
    "middle": ((16, 3, 256, 64), {"training.gradient_accumulation_steps": 2, "query.k": 2}),
    "large": ((24, 4, 320, 96), {"training.gradient_checkpointing": True, "sources.two.guidance_scale": 2.0}),
}


def off(root, family, **changes) -> float:
    """By how much of the peak the estimate is more than it."""
    takes, places = family in ("flux", "kontext", "flux2"), ("student", "sources.one", "sources.two")
    changes = {f"{place}.embedded_guidance": 3.5 for place in places if takes} | changes
    changes |= {f"capabilities.{name}.task": KINDS[family] for name in ("one", "two")}
    config = config_of(root, **{"training.rollout_batch_size": 4, "rollout.num_inference_steps": 2, **changes})
    plan = dry_run(config, examine)
    assert plan.problems == []
    # A CPU takes AdamW's parameters one by one, a card all at once.
    estimate, peak = plan.total_memory() - plan.memory[STEP][0], update_peak(config)
    print(f"{family}: estimate {estimate / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, {estimate / peak - 1:+.1%}")
    return estimate / peak - 1


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("size", [s if s == "small" else pytest.param(s, marks=pytest.mark.slow) for s in SIZES])
def test_the_estimate_of_an_adapter_is_what_updates_take_within_10_percent(family, size, tmp_path):
    dimensions, changes = SIZES[size]
    root = wide_place(tmp_path, family, *dimensions, task=KINDS[family])
    assert abs(off(root, family, **{"student.lora.rank": 16}, **changes)) < 0.1


@pytest.mark.parametrize("family", ["sd3", pytest.param("klein", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"training.gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"training.precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"training.precision": "bf16", "training.gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_of_a_full_student_too(family, changes, tmp_path):
    root = wide_place(tmp_path, family, 12, 2, 192, 32)
    assert abs(off(root, family, student={}, **changes)) < 0.1
