"""Static passes of the student: the gradients of the plain way, bit for bit, however they are asked."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.card import network as network_of_card
from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import guided, routed, within
from danceopd.core.forwards import SharedField
from danceopd.models.fp8 import to_fp8
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import LoraStudent
from danceopd.training.rollouts import trained
from danceopd.training.rollouts.capture import Pool
from danceopd.training.rollouts.static import StaticField
from danceopd.training.rollouts.trained import StaticStudent
from danceopd.training.rows import Rows
from danceopd.world.dit import DiT, DiTConfig

SIZES = DiTConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2, mlp_ratio=1)


def network() -> DiT:
    torch.manual_seed(0)
    made = DiT(SIZES)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return made


def samples(n: int, sourced: list[bool], seed: int = 0):
    torch.manual_seed(seed)
    prompt = torch.randint(1, 400, (n, SIZES.text_length))
    conditioning = Conditioning(prompt, torch.randn(n, 3, 8, 8), torch.tensor(sourced))
    return torch.randn(n, 3, 8, 8), torch.rand(n) * 0.8 + 0.1, conditioning


def gradients(student: DiT, field, calls: list) -> tuple[list, dict]:
    """The losses and all gradients after so many micro-batches."""
    student.zero_grad(set_to_none=True)
    losses = []
    for z, sigma, conditioning in calls:
        loss = field(z, sigma, conditioning).square().mean()
        loss.backward()
        losses.append(float(loss))
    return losses, {name: None if p.grad is None else p.grad.clone() for name, p in student.named_parameters()}


def alike(one: tuple, other: tuple) -> None:
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        found = other[1][name]
        assert (gradient is None) == (found is None), name
        assert gradient is None or torch.equal(gradient, found), name


MIXED = [samples(3, [False, True, False]), samples(2, [True, True], 1), samples(3, [True, False, False], 2)]


def test_micro_batches_of_either_kind_add_up_to_the_same():
    student = network()
    static = StaticStudent(student, [student])
    plain = gradients(student, student, MIXED)
    alike(plain, gradients(student, static, MIXED))
    alike(plain, gradients(student, static, MIXED))  # once more, in the buffers that are there
    assert len(static.passes) == 2  # the first and the last have as many of either kind


def test_an_optimizer_steps_on_the_gradients_that_stay():
    states = []
    for static in (False, True):
        student = network()
        field = StaticStudent(student, [student]) if static else student
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            for z, sigma, conditioning in MIXED:
                field(z, sigma, conditioning).square().mean().backward()
            nn.utils.clip_grad_norm_(student.parameters(), 0.1)
            optimizer.step()
        states.append(student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_is_asked_before_the_backward_goes_to_the_field():
    student = network()
    static = StaticStudent(student, [student])

    def twice(field):
        return lambda z, sigma, conditioning: field(z, sigma, conditioning) + field(z, sigma, conditioning)

    # Of samples of one kind: of two kinds four gradients are added, in another order.
    alike(gradients(student, twice(student), MIXED[1:2]), gradients(student, twice(static), MIXED[1:2]))
    static(*MIXED[0])  # nobody wants its gradient, and so the next one is static again
    assert not static._busy()
    before = len(static.passes)
    static(*MIXED[0])
    static(*MIXED[0]).sum().backward()
    assert len(static.passes) == before
    assert not static._busy()


def test_eager_micro_batches_before_and_after_are_kept():
    student = network()
    static = StaticStudent(student, [student])

    def mixture():
        ways = iter((student, static, student))
        return lambda *asked: next(ways)(*asked)

    alike(gradients(student, student, MIXED), gradients(student, mixture(), MIXED))


def test_a_guided_student_is_the_same():
    student = network()
    static = StaticStudent(student, [student])
    calls = [(z, s, replace(c, guidance_scale=torch.linspace(1, 3, len(z)))) for z, s, c in MIXED]
    empty = torch.zeros(SIZES.text_length, dtype=torch.int64)
    alike(gradients(student, guided(student, empty), calls), gradients(student, guided(static, empty), calls))
    assert static.passes


def test_without_gradient_and_beyond_the_last_pass_the_field_is_asked(monkeypatch):
    monkeypatch.setattr(trained, "PASSES", 1)
    student = network()
    static = StaticStudent(student, [student])
    with torch.no_grad():
        assert torch.equal(static(*MIXED[0]), student(*MIXED[0]))
    assert not static.passes
    alike(gradients(student, student, MIXED), gradients(student, static, MIXED))
    assert len(static.passes) == 1


@pytest.mark.parametrize("fp8", [False, True])
def test_an_adapter_and_mixed_sources_on_one_base_are_the_same(fp8):
    base = network_of_card.make(network_of_card.TINY, torch.device("cpu"), torch.float32)
    layers, loras = target_layers(base, network_of_card.LORA_TARGETS), []
    for rank in (2, 4):
        widths = {name: base.get_submodule(name).weight.shape for name in layers}
        drawn = {name: (torch.randn(rank, w), torch.randn(out, rank) / 10, 1.0) for name, (out, w) in widths.items()}
        loras.append(drawn)
    shared = SharedBase(to_fp8(base) if fp8 else base, loras, network_of_card.velocity, layers)
    student = LoraStudent(shared, layers, 4, 4, torch.Generator().manual_seed(1))
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.1)
    z, conditioning = network_of_card.samples(network_of_card.TINY, 6, torch.device("cpu"))
    sigma = torch.linspace(0.9, 0.1, 6)
    calls = [(z[part], sigma[part], conditioning[part]) for part in (slice(0, 2), slice(2, 3), slice(3, 5))]
    alike(gradients(student, student, calls), gradients(student, StaticStudent(student, [student, base]), calls))

    def ask(latents, sigma, conditioning):
        return shared(latents, sigma, conditioning, conditioning.adapter)

    sources, spent = [SharedField(shared, ask, m) for m in (0, 1, -1)], Counter()
    steps = StaticField(ask, ask, spent=spent, name="sources", rows=Rows(8))
    static = [within(source, lambda _: steps.once) for source in sources]
    for route in ([0, 1, 2, 1, 0, 0], [1, 1, 1, 0, 2, 0]):  # the second through the buffers of the first
        wanted, found = (routed(f, torch.tensor(route), z, sigma, conditioning).target() for f in (sources, static))
        assert torch.equal(wanted, found)
    assert spent == {"sources": 12, "padding": 0}
    assert len(steps.programs) == 1


def test_a_second_backward_is_refused():
    student = network()
    loss = StaticStudent(student, [student])(*MIXED[0]).square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_micro_batches_add_up_to_the_same(monkeypatch):
    monkeypatch.setenv("DANCEOPD_KERNELS", "torch")
    student, pool = network().cuda(), Pool(torch.device("cuda"))
    static = StaticStudent(student, [student], pool)
    calls = [(z.cuda(), sigma.cuda(), conditioning.to("cuda")) for z, sigma, conditioning in MIXED]
    plain = gradients(student, student, calls)
    for _ in range(3):
        found = gradients(student, static, calls)
        assert found[0] == pytest.approx(plain[0], rel=1e-5)
        for name, gradient in plain[1].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert all(own.graphs for own in static.passes.values())
    assert static.reason is None
