"""Every method through the real loop: it trains, counts its evaluations, and resumes bit for bit."""

import copy
import itertools
import json
import math
from collections import Counter

import pytest
import torch
from by_hand import (
    close,
    constant,
    generator,
    update,
)
from hypothesis import given
from hypothesis import strategies as st
from world_runs import two_sources, write_networks

from danceopd.config.reading import parse_config
from danceopd.core.methods import METHODS
from danceopd.core.methods.danceopd import danceopd
from danceopd.core.query import query
from danceopd.core.randomness import sample_generators
from danceopd.support.errors import UserError
from danceopd.training.checkpoints import load_newest, save_state
from danceopd.training.loop import Trainer
from danceopd.training.resume import go_on, state_of
from danceopd.world.build import build
from danceopd.world.data import write_world
from danceopd.world.dit import DiTConfig

SEED = st.integers(0, 2**40)


TINY = DiTConfig(width=16, depth=1, heads=2, mlp_ratio=1)
N, B = 4, 8


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Three networks whose every parameter counts, on disk."""
    folder = tmp_path_factory.mktemp("networks")
    write_networks(folder, sizes=TINY)
    return folder


def config_of(networks, folder, **sections):
    raw = {
        **two_sources(networks, 20),
        "rollout": {"num_inference_steps": N},
        "training": {"output_dir": str(folder), "batch_size": B, "max_steps": 8, "warmup_steps": 0},
    }
    for key, value in sections.items():
        raw[key] = {**raw[key], **value} if key in ("rollout", "training") else value
    if sections.get("method") == "joint":
        del raw["rollout"]  # it rolls nothing out
    return parse_config(raw)


# What differs from the configuration above, and what two updates cost. D: the indices that the query draws.
VARIANTS = {
    "danceopd": ({}, lambda D: {"student": D.sum() + 2 * B, "sources": 2 * B, "backward": 4 * B}),
    "danceopd k=16": (
        {"query": {"k": 16}},
        lambda D: {"student": 2 * B * (N - 1 + N), "sources": 2 * B * N, "backward": 4 * B * N},  # all there are
    ),
    "danceopd warm, soft, ab2, in turn": (
        {
            "options": {"warm_start": 0.9, "routing": "soft", "objective": "clean"},
            "rollout": {"solver": "ab2"},
            "route": "round_robin",
        },
        lambda D: {"student": 2 * B, "sources": D.sum() + 2 * 2 * B, "backward": 4 * B},
    ),
    "danceopd adaptive, gap": ({"route": "adaptive", "query": {"bias": "gap"}}, None),
    "danceopd_fast": (
        {"options": {"warm_start": 0.1}},
        lambda D: {"student": D[1].sum() + 2 * B, "sources": 2 * B, "backward": 4 * B},
    ),
    "joint": ({}, lambda D: {"student": 2 * B, "backward": 4 * B}),
    "off_policy": ({}, lambda D: {"student": 2 * B, "sources": 2 * B, "backward": 4 * B}),
    "off_policy sources": (
        {"options": {"states_from": "sources"}},
        lambda D: {"student": 2 * B, "sources": 2 * B * (N + 1), "backward": 4 * B},
    ),
    "diffusion_opd": (
        {"route": "round_robin"},
        lambda D: {"student": 2 * B * (N - 1 + N), "sources": 2 * B * N, "backward": 4 * B * N},
    ),
    "flow_opd": (
        {"options": {"group_size": 4}},
        lambda D: {"student": 4 * B * N, "sources": 2 * B * N, "backward": 4 * B * N},
    ),
    "flow_opd anchor": (
        {"options": {"group_size": 2, "anchor_weight": 0.1, "detach_advantage": False}},
        lambda D: {"student": 4 * B * N, "sources": 2 * B * N, "anchor": 2 * B * N, "backward": 4 * B * N},
    ),
    "consistency": (
        {},
        lambda D: {
            "student": D.sum() + 2 * B,
            "sources": 2 * B,
            "ema": (D < N - 1).sum(),
            "backward": 4 * B,
        },
    ),
    "sds": ({}, lambda D: {"student": D.sum() + 4 * B, "sources": 2 * B, "backward": 4 * B}),
    "dmd": ({}, lambda D: {"student": D.sum() + 4 * B, "sources": 2 * B, "fake": 8 * B, "backward": 4 * B}),
    "pooled": (
        {},
        lambda D: {
            "student": D.sort(2).values[0, : B // 2, 1].sum() + D.sort(2).values[1, : B // 2, 0].sum() + B // 2 + B,
            "sources": B // 2 + B,
            "backward": 2 * (B // 2 + B),
        },
    ),
    "pooled in parts": ({"options": {"visits": 3}, "training": {"gradient_accumulation_steps": 2}}, None),
}


def test_every_method_has_a_variant():
    assert {name.split()[0] for name in VARIANTS} == set(METHODS)


def same(a, b, path=""):
    """Two nested states, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def saved(trainer, folder):
    """A trainer's checkpoint."""
    save_state(folder, trainer.step, *trainer.engine.tensors(), state_of(trainer), 1)
    return load_newest(folder)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_method_trains_counts_and_resumes_bit_for_bit(networks, tmp_path, name):
    sections, expected = VARIANTS[name]
    config = config_of(networks, tmp_path, method=name.split()[0], **sections)
    whole = Trainer(config, build(config))
    before = copy.deepcopy(whole.parts.student.state_dict())
    records = [whole.update() for _ in range(2)]
    assert all(math.isfinite(r["loss"]) and r["gradient_norm"] > 0 for r in records)
    assert whole.skipped == 0
    moved = [k for k, v in whole.parts.student.state_dict().items() if not torch.equal(v, before[k])]
    assert "patch_out.weight" in moved
    if expected:
        k = 2 if name == "pooled" else config.query.k
        size = B // 2 if name == "pooled" else B
        numbers = [[step * B + i for i in range(B)] for step in range(2)]
        drawn = [query(size, N, sample_generators(0, 1, own), bias="low_t", k=k) for own in numbers]
        counts = {key: int(value) for key, value in expected(torch.stack(drawn)).items()}
        assert +whole.evaluations == counts
        assert records[-1]["network_evaluations"] == sum(counts.values())
    resumed = Trainer(config, build(config))
    go_on(resumed, saved(whole, tmp_path))
    for trainer in (whole, resumed):
        trainer.update()
    for a, b in zip(whole.engine.tensors(), resumed.engine.tensors(), strict=True):
        same(a, b)
    same(state_of(whole), state_of(resumed))


def test_the_anchor_is_the_untrained_student(networks, tmp_path):
    """Also after a resumed run has loaded the trained one, and no optimizer moves it."""
    config = config_of(networks, tmp_path, method="flow_opd", options={"group_size": 4, "anchor_weight": 1.0})
    trainer = Trainer(config, build(config))
    start = copy.deepcopy(trainer.parts.student.state_dict())
    trainer.update()
    resumed = Trainer(config, build(config))
    go_on(resumed, saved(trainer, tmp_path))
    for parts in (trainer.parts, resumed.parts):
        same(start, parts.anchor.state_dict())
    assert not torch.equal(resumed.parts.student.state_dict()["patch_out.weight"], start["patch_out.weight"])


def test_only_who_asks_for_pictures_or_an_anchor_gets_them(networks, tmp_path):
    for method, clean, anchor in (("danceopd", False, False), ("joint", True, False), ("flow_opd", False, True)):
        options = {"group_size": 4} if method == "flow_opd" else {}
        config = config_of(networks, tmp_path, method=method, options=options)
        trainer = Trainer(config, build(config))
        assert (trainer.parts.anchor is not None) == anchor
        batch = trainer.draw()
        assert (batch.clean is not None) == clean
        if clean:  # each sample's own picture, in the order of the batch
            same_without = Trainer(config_of(networks, tmp_path), trainer.parts).draw()
            assert torch.equal(batch.noise, same_without.noise)
            for m, data in enumerate(trainer.parts.samples.groups[0].data):
                pictures = data.targets(list(range(20)))
                for picture in batch.clean[batch.route == m]:
                    assert (pictures == picture).flatten(1).all(1).any()


def test_learning_from_pictures_needs_pictures(networks, tmp_path):
    manifest = write_world(tmp_path / "data", ["t2i"], 4, 0)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        del line["target_image"]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capabilities = {"t2i": {"source": "one", "task": "t2i", "data": {"manifest": str(manifest)}}}
    build(config_of(networks, tmp_path, capabilities=capabilities))  # DanceOPD needs prompts alone
    for method in ("joint", "off_policy", "danceopd_fast"):
        with pytest.raises(UserError, match=r"capabilities\.t2i\.data: .*no row of 't2i' has a target_image"):
            build(config_of(networks, tmp_path, method=method, capabilities=capabilities))


def test_adaptive_routes_and_gap_queries_follow_the_runs_own_gaps(networks, tmp_path):
    """The gap of a capability moves its share of the batch, and the gap at an index the share of its queries."""
    capabilities = {
        "t2i": {"source": "one", "task": "t2i", "data": {"world": "t2i", "size": 20}},
        "style": {"source": "two", "task": "t2i", "data": {"world": "style", "size": 20}},
    }
    config = config_of(
        networks,
        tmp_path,
        capabilities=capabilities,
        route="adaptive",
        query={"bias": "gap"},
        training={"batch_size": 400},
    )
    trainer = Trainer(config, build(config))
    assert (trainer.draw().route == 1).double().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 20)
    trainer.errors.capability[:] = torch.tensor([1.0, 4.0])
    trainer.errors.index[:] = torch.tensor([1.0, 0.0, 9.0, 2.0])
    share = 1.6 / (0.4 + 1.6)
    assert (trainer.draw().route == 1).double().mean().item() == pytest.approx(share, abs=4 * 0.4 / 20)
    weights = torch.tensor([1.0, 4.0, 9.0, 2.0]).sqrt()
    provided = {**trainer.provided(trainer.draw()), "generator": generator()}
    torch.testing.assert_close(provided["gap"].float(), weights)
    depth = update(danceopd, constant(0.0), [constant(0.0)] * 2, trainer.draw(), **provided).depth
    close(depth.bincount(minlength=4) / len(depth), weights / weights.sum(), atol=4 * 0.5 / 400**0.5)


def test_a_run_learns_its_gaps(networks, tmp_path):
    config = config_of(networks, tmp_path, route="adaptive", query={"bias": "gap"})
    trainer = Trainer(config, build(config))
    batch = trainer.draw()
    asked = trainer.ask(batch)["student"]
    error = trainer.match({"student": asked}, 1)[0].error
    trainer.engine.student.zero_grad()
    trainer.update()
    mean = {m: float(error[batch.route == m].mean()) for m in (0, 1)}
    average = (mean[0] + mean[1]) / 2
    assert trainer.errors.route_weights([1.0, 1.0]) == pytest.approx([mean[0] / average, mean[1] / average], rel=1e-3)


@pytest.mark.parametrize(("times", "at"), [(0, []), (1, [0, 5]), (3, [0, 2, 3, 5]), (5, [0, 1, 2, 3, 4, 5])])
def test_network_evaluations_end_a_run_and_pace_it(networks, tmp_path, times, at):
    """Joint training costs 3 B an update: 100 are spent in the fifth. Scores at the start, and then evenly spread."""
    training = {"max_steps": 1000, "max_network_evaluations": 100, "lr_schedule": "cosine", "log_every": 1}
    config = config_of(
        networks,
        tmp_path,
        method="joint",
        training={**training, "sample_every": 0},
        evaluation={"times": times},
    )
    parts = build(config)
    parts.score = lambda network: {"geneval_overall": 0.5}
    Trainer(config, parts).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [record for record in log if "loss" in record]
    assert [r["network_evaluations"] for r in losses] == [24, 48, 72, 96, 120]
    rates = [r["learning_rate"] for r in losses]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[0] > 0.8 * config.training.learning_rate > 0.1 * config.training.learning_rate > rates[-1]
    assert [r["step"] for r in log if "evaluation" in r] == at
    assert load_newest(tmp_path / "checkpoints")[0].step == 5


@given(share=st.floats(0, 1.5), step=st.integers(0, 100))
def test_progress_is_the_further_of_steps_and_evaluations(share, step):
    """And the cosine follows it, with no warmup, from the whole rate down to none."""
    training = {"output_dir": "x", "max_steps": 100, "warmup_steps": 0, "lr_schedule": "cosine", "learning_rate": 0.01}
    sections = {
        "sources": {"a": {"weights": "t2i"}},
        "capabilities": {"t2i": {"source": "a", "task": "t2i", "data": {"world": "t2i"}}},
    }
    for limit in (None, 1000):
        trainer = Trainer.__new__(Trainer)
        trainer.config = parse_config({**sections, "training": {**training, "max_network_evaluations": limit}})
        trainer.step, trainer.scores, trainer.evaluations = (
            step,
            [],
            Counter(student=int(600 * share), backward=int(400 * share)),
        )
        done = step / 100 if limit is None else min(1, max(step / 100, trainer.evaluations.total() / 1000))
        assert trainer.progress() == pytest.approx(done)
        assert trainer.learning_rate() == pytest.approx(0.005 * (1 + math.cos(math.pi * done)), abs=1e-9)
