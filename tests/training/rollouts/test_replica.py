"""Rollouts on a copy of the student in bf16 or FP8: what it holds, how near its states are, resumed and planned."""

import pytest
import torch
from danceopd_kernels import fp8_quantize_rowwise
from kernel_device import devices
from model_runs import config_of as model_config
from world_runs import config_of

from danceopd.api import builder_of, examiner_of
from danceopd.config.reading import load_config
from danceopd.core.rollout import rollout
from danceopd.models.fp8 import Fp8Linear
from danceopd.planning import dry_run as planning
from danceopd.planning.cluster import Setting, plan
from danceopd.support.errors import UserError
from danceopd.training.checkpoints import load_newest, save_state
from danceopd.training.engine import Local
from danceopd.training.loop import Trainer
from danceopd.training.resume import go_on, state_of
from danceopd.training.rollouts.compiled import compile_blocks
from danceopd.training.rollouts.replica import bytes_beside
from danceopd.world.files import SHIPPED, load_model


def trainer_of(config):
    return Trainer(config, builder_of(config)(config))


def dry_run(config):
    return planning.dry_run(config, examiner_of(config))


def check_copy(engine, precision, bf16=False):
    """Each place of the replica holds what the precision makes of the student's parameter."""
    rounded = 0
    for name, p in engine.student.named_parameters():
        layer, _, leaf = name.rpartition(".")
        module, kept = engine.replica.get_submodule(layer), engine.replica.get_parameter(name)
        linear = isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        want = p.detach().bfloat16() if linear and (bf16 or precision == "bf16") else p.detach()
        if isinstance(module, Fp8Linear) and leaf == "weight":
            want, scale = fp8_quantize_rowwise(want)
            assert torch.equal(module.weight_scale, scale)
            rounded += 1
        assert kept.dtype == want.dtype
        assert torch.equal(kept.float(), want.float()), name
    assert bool(rounded) == (precision == "fp8")


def addresses(network):
    return [t.data_ptr() for t in (*network.parameters(), *network.buffers())]


def states(trainer, field, steps=4):
    """Of a batch's whole rollouts by a network, as the loop would ask it."""
    batch = trainer.draw()
    until = torch.arange(steps + 1).expand(len(batch), -1)
    return rollout(field, batch.noise, batch.conditioning, trainer.sigmas, until)[0]


def furthest(found, expected):
    """The largest relative difference of a sample's state."""
    return float(((found - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)).max())


CASES = [("fp32", "bf16"), ("fp32", "fp8"), ("bf16", "bf16"), ("bf16", "fp8")]


@pytest.mark.parametrize(("precision", "wanted"), CASES)
def test_the_copy_is_the_rounded_student_after_every_update(raw, precision, wanted):
    """Where it was, so that graphs captured once stay valid; an update that is skipped changes nothing."""
    trainer = trainer_of(config_of(raw, precision=precision, rollout_precision=wanted))
    engine = trainer.engine
    check_copy(engine, wanted, precision == "bf16")
    before = addresses(engine.replica)
    for _ in range(2):
        old = [p.clone() for p in engine.replica.parameters()]
        trainer.update()
        check_copy(engine, wanted, precision == "bf16")
        assert any(not torch.equal(a.float(), b.float()) for a, b in zip(old, engine.replica.parameters(), strict=True))
    assert addresses(engine.replica) == before
    assert not any(p.requires_grad for p in engine.replica.parameters())


@pytest.mark.parametrize(("wanted", "error"), [(None, 0.0), ("bf16", 0.01), ("fp8", 0.04)])
def test_states_are_near_the_students_own(tmp_path, wanted, error):
    """The shipped base through the loop's own field, every state that may be asked; null is the student itself."""
    changes = [f"training.rollout_precision={wanted or 'null'}", f"training.output_dir={tmp_path}"]
    changes += ["rollout.num_inference_steps=16", "training.batch_size=4"]
    changes += ["capabilities.t2i.data.size=8", "capabilities.edit.data.size=8"]
    trainer = trainer_of(load_config("configs/demo.yaml", changes))
    with torch.no_grad():
        found, expected = (states(trainer, f, 15) for f in (trainer.student, trainer.engine.student))
    distance = furthest(found, expected)
    assert distance == 0 if wanted is None else 0 < distance < error
    assert (trainer.engine.resident is trainer.engine.student) == (wanted is None)


def test_bf16_on_bf16_is_what_autocast_computes(raw):
    trainer = trainer_of(config_of(raw, precision="bf16", rollout_precision="bf16"))
    plain = trainer_of(config_of(raw, precision="bf16"))
    with torch.no_grad():
        assert torch.equal(*(states(t, t.student) for t in (trainer, plain)))
    assert trainer.update()["loss"] == plain.update()["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", [pytest.param(d, marks=pytest.mark.gpu) if d == "cuda" else d for d in devices()])
def test_every_product_of_an_fp8_rollout_is_of_codes(raw, monkeypatch, device, precision):
    """Counted. Under autocast each comes out in bfloat16, which is all that a card's product gives."""
    trainer = trainer_of(config_of(raw, device=device, precision=precision, rollout_precision="fp8"))
    product, made = torch._scaled_mm, []

    def counting(*args, out_dtype, **options):
        made.append(out_dtype)
        return product(*args, out_dtype=out_dtype, **options)

    monkeypatch.setattr(torch, "_scaled_mm", counting)
    asked = []
    for module in trainer.engine.replica.modules():
        if isinstance(module, Fp8Linear) and not module.modulates:
            module.register_forward_hook(lambda *_: asked.append(1))
    trainer.update()
    assert len(made) == len(asked) > 0
    if precision == "bf16" or device == "cuda":
        assert set(made) == {torch.bfloat16}


def test_the_query_runs_on_the_student(raw):
    trainer = trainer_of(config_of(raw, rollout_precision="fp8"))
    asked = []
    trainer.engine.student.register_forward_hook(lambda *_: asked.append(torch.is_grad_enabled()))
    trainer.engine.replica.register_forward_hook(lambda *_: asked.append("copy"))
    trainer.update()
    assert asked[-1] is True
    assert asked.count(True) == 1
    assert set(asked) == {True, "copy"}


@pytest.mark.parametrize("wanted", ["bf16", "fp8"])
def test_resumed_is_uninterrupted(raw, tmp_path, wanted):
    config = config_of(raw, rollout_precision=wanted, cuda_graphs=True)  # static steps on the copy
    whole, resumed = trainer_of(config), trainer_of(config)
    whole.update()
    save_state(tmp_path, whole.step, *whole.engine.tensors(), state_of(whole), 1)
    go_on(resumed, load_newest(tmp_path)[0])
    for _ in range(2):
        assert whole.update() == resumed.update()
    for trainer in (whole, resumed):
        check_copy(trainer.engine, wanted)
    other = trainer_of(config_of(raw))
    with pytest.raises(UserError, match=r"another configuration \(training.rollout_precision\)"):
        go_on(other, load_newest(tmp_path)[0])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_static_steps_and_compiled_blocks_ask_the_copy(raw, monkeypatch, compiled):
    """The same loss as asked step by step and not compiled."""
    monkeypatch.setattr("danceopd.training.loop.compile_blocks", lambda network: compile_blocks(network, "eager"))
    plain = trainer_of(config_of(raw, rollout_precision="fp8"))
    trainer = trainer_of(config_of(raw, rollout_precision="fp8", cuda_graphs=True, compile=compiled))
    assert trainer.update()["loss"] == pytest.approx(plain.update()["loss"], rel=1e-4)
    assert trainer.student.networks == [trainer.engine.replica]
    assert bool(trainer.engine.replica.blocks[0]._compiled_call_impl) == compiled
    assert not trainer.engine.student.blocks[0]._compiled_call_impl


# ----------------------------------------------------------------------------------------- a model's students


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", "bf16"), ("bf16", "fp8")])
def test_a_models_student_of_all_weights(places, precision, wanted):
    root = places("sd3")
    own = {
        name: {"source": "own", "task": "t2i", "data": {"prepared": str(root / "cache" / "rows.jsonl")}}
        for name in ("one", "two")
    }
    config = model_config(
        root,
        student={},
        sources={"own": {"weights": str(root / "other")}},
        capabilities=own,
        **{"training.precision": precision, "training.rollout_precision": wanted},
    )
    trainer = trainer_of(config)
    trainer.update()
    check_copy(trainer.engine, wanted, precision == "bf16")
    with torch.no_grad():
        found, expected = (states(trainer, f, 3) for f in (trainer.student, trainer.engine.student))
    assert 0 < furthest(found, expected) < 0.1  # random and tiny
    assert dry_run(config).memory["replica for rollouts"][0] == bytes_beside(
        trainer.engine.replica, trainer.engine.student
    )


@pytest.mark.parametrize("family", ["flux", "z"])
def test_an_adapter_on_a_copy_of_its_base_in_fp8(places, family):
    """Sources keep the plain base, and the copy holds nothing twice but codes, scales and the adapter."""
    changes = {"training.rollout_precision": "fp8", "training.learning_rate": 0.05}
    if family == "flux":
        changes |= {f"{key}.embedded_guidance": 3.5 for key in ("student", "sources.one", "sources.two")}
    config = model_config(places(family), **changes)
    trainer = trainer_of(config)
    engine = trainer.engine
    before = addresses(engine.replica.transformer)
    trainer.update()
    for a, b in zip(engine.student.parameters(), engine.replica.parameters(), strict=True):
        assert torch.equal(a, b)
    plain = dict(engine.student.transformer.named_modules())
    layers = [
        (n, m) for n, m in engine.replica.transformer.named_modules() if getattr(m, "weight_scale", None) is not None
    ]
    assert layers
    for name, layer in layers:
        assert plain[name].weight.dtype == torch.float32
        codes, scale = fp8_quantize_rowwise(plain[name].weight)
        assert torch.equal(layer.weight.float(), codes.float())
        assert torch.equal(layer.weight_scale, scale)
        assert layer.bias is plain[name].bias
    assert addresses(engine.replica.transformer) == before
    with torch.no_grad():
        found, expected = (states(trainer, f, 4) for f in (trainer.student, engine.student))
    assert 0 < furthest(found, expected) < 0.1
    own = sum(layer.weight.nbytes + layer.weight_scale.nbytes for _, layer in layers)
    own += sum(p.nbytes for p in engine.student.parameters())
    assert bytes_beside(engine.replica, engine.student) == own
    assert dry_run(config).memory["replica for rollouts"][0] == own


def test_an_adapters_base_in_fp8_is_shared(places):
    changes = {"training.rollout_precision": "fp8", "training.base_precision": "fp8"}
    config = model_config(places("sd3"), **changes)
    trainer = trainer_of(config)
    assert trainer.engine.replica is None
    assert trainer.engine.resident is trainer.engine.student
    assert "replica for rollouts" not in dry_run(config).memory


# -------------------------------------------------------------------------------------------- what is planned


@pytest.mark.parametrize("wanted", ["bf16", "fp8"])
def test_its_bytes_are_planned(wanted):
    changes = [f"training.rollout_precision={wanted}", "training.optimizer=adamw"]
    config = load_config("configs/demo.yaml", changes)
    engine = Local(load_model(SHIPPED / "base.safetensors"), config)
    size = bytes_beside(engine.replica, engine.student)
    assert dry_run(config).memory["replica for rollouts"][0] == size
    n = sum(p.numel() for p in engine.student.parameters())
    assert n < size < 4 * n
    scaled = plan(config, examiner_of(config), 8, "h100")
    for stage in range(4):
        assert scaled.estimate(Setting(stage)).device["replica for rollouts"] == size


WRONG = {
    "joint rolls nothing out": {"method": "joint"},
    "off_policy does not roll the student out": {"method": "off_policy"},
    "log-probabilities with the student's own": {"method": "flow_opd"},
    "rollout_on: shards asks the student itself": {"training.rollout_on": "shards"},
    "'fp4' is not valid": {"training.rollout_precision": "fp4"},
}


@pytest.mark.parametrize("said", WRONG)
def test_mistakes_are_named(said):
    changes = {"training.rollout_precision": "fp8", **WRONG[said]}
    with pytest.raises(UserError, match=f"training.rollout_precision: .*{said}"):
        load_config("configs/demo.yaml", [f"{key}={value}" for key, value in changes.items()])


@pytest.mark.parametrize(
    ("wanted", "changes", "said"),
    [
        ("bf16", {"training.precision": "fp32"}, "runs as its base does, which is in fp32"),
        ("bf16", {"training.precision": "bf16", "training.base_precision": "fp8"}, "which is in fp8"),
        ("fp8", {"training.base_precision": "int8"}, "the adapter's base is in int8"),
    ],
)
def test_an_adapters_precision_is_its_bases(tmp_path, wanted, changes, said):
    with pytest.raises(UserError, match=said):
        model_config(tmp_path, **changes, **{"training.rollout_precision": wanted})
