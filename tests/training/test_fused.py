"""The fused operation in its real role: what a training step hands to it, for each method, setting and family."""

from collections import Counter

import pytest
import torch
from model_runs import FAMILIES, config_of

from danceopd.api import builder_of
from danceopd.config.reading import parse_config
from danceopd.core import objectives
from danceopd.core.fields import Answers
from danceopd.core.methods import METHODS
from danceopd.training.loop import Trainer

WRITES = {"flow_opd", "consistency", "sds", "dmd"}  # bring a match of their own, which needs the target itself


EMBEDDED = {"flux", "kontext", "flux2"}  # families that take their guidance as an input


class Calls:
    """Remembers what the trainer gives the fused operation, and counts targets that are written."""

    def __init__(self, monkeypatch):
        self.given, self.targets, self.copied = [], 0, 0
        real, target, to = objectives.routed_velocity_mse, Answers.target, Answers.to

        def called(student, teachers, route=None, **keywords):
            self.given.append((student, teachers, route, keywords))
            return real(student, teachers, route, **keywords)

        def written(answers):
            self.targets += 1
            return target(answers)

        def converted(answers, dtype):
            found = to(answers, dtype)
            self.copied += found is not answers
            return found

        monkeypatch.setattr(objectives, "routed_velocity_mse", called)
        monkeypatch.setattr(Answers, "target", written)
        monkeypatch.setattr(Answers, "to", converted)


def world_config(raw, method="danceopd", **sections):
    rollout = {} if method == "joint" else raw["rollout"]  # it reads no steps
    training = {**raw["training"], "batch_size": 16, **sections.pop("training", {})}
    return parse_config({**raw, "method": method, "rollout": rollout, **sections, "training": training})


def guided_sources(raw):
    """Two guided sources of the picture world."""
    scales = {"one": 5.0, "two": 2.0}
    return {name: {**source, "guidance_scale": scales[name]} for name, source in raw["sources"].items()}


def one_update(config, monkeypatch) -> Calls:
    trainer, calls = Trainer(config, builder_of(config)(config)), Calls(monkeypatch)
    record = trainer.update()
    assert record["skipped"] == 0
    return calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [1, 4])
def test_every_method_hands_over_rows_of_what_its_sources_answered(raw, monkeypatch, method, parts):
    options = {"group_size": 4} if method == "flow_opd" else {}
    training = {"gradient_accumulation_steps": parts}
    calls = one_update(world_config(raw, method, options=options, training=training), monkeypatch)
    plain = [call for call in calls.given if "weight" in call[3]]
    if method not in WRITES:
        assert calls.targets == 0
        assert len(plain) == len(calls.given) == parts
        rows = torch.cat([keywords["row"] for *_, keywords in plain])
        _, teachers, _, _ = plain[0]
        assert all(call[1] is teachers or all(a is b for a, b in zip(call[1], teachers, strict=True)) for call in plain)
        assert len(rows) == sum(len(student) for student, *_ in plain)
        assert all(keywords["norms"] for *_, keywords in plain)
    assert calls.copied == 0


def test_setting_d_never_writes_a_guided_target(raw, monkeypatch):
    """Guided sources: both branches lie in one tensor of one forward, and the operation combines them."""
    calls = one_update(world_config(raw, sources=guided_sources(raw)), monkeypatch)
    [(student, teachers, network, keywords)] = calls.given
    assert calls.targets == 0
    assert len(teachers) == 2
    assert sum(map(len, teachers)) == 2 * len(student)  # conditional and unconditional
    assert keywords["uncond"] is teachers
    assert set(keywords["guidance_scale"].tolist()) == {5.0, 2.0}
    assert (keywords["uncond_row"] != keywords["row"]).all()
    for m, own in Counter(network.tolist()).items():
        rows = torch.cat([keywords[key][network == m] for key in ("row", "uncond_row")])
        assert sorted(rows.tolist()) == list(range(2 * own))  # each row of a forward is used, and once


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_models_match_without_a_written_target(places, tmp_path, monkeypatch, family, precision):
    """LoRA sources of one base, one of them guided; only Qwen-Image's own combination is written, by its source."""
    changes = {
        "training.output_dir": str(tmp_path),
        "training.precision": precision,
        "training.batch_size": 4,
        "training.gradient_accumulation_steps": 2,
        "sources.one.guidance_scale": 3.0,
    }
    if family in EMBEDDED:
        keys = ("student", "sources.one", "sources.two")
        changes |= {f"{key}.embedded_guidance": 3.5 for key in keys}
    calls = one_update(config_of(places(family), **changes), monkeypatch)
    assert calls.targets == 0
    assert calls.copied == 0  # the student answers in the dtype that its sources answer in
    assert len(calls.given) == 2
    for _, teachers, _, keywords in calls.given:
        assert len(teachers) == 1  # one forward for both LoRA sources
        assert (keywords["guidance_scale"] is None) == family.startswith("qwen")


def test_plain_pytorch_agrees(raw, monkeypatch):
    records = []
    for backend in ("cpu", "torch"):
        monkeypatch.setenv("DANCEOPD_KERNELS", backend)
        config = world_config(raw, sources=guided_sources(raw))
        records.append(Trainer(config, builder_of(config)(config)).update())
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-5)
    assert records[0]["gradient_norm"] == pytest.approx(records[1]["gradient_norm"], rel=1e-4)
