"""Operator fields and routing between fields, against the formulas on single samples."""

from collections import Counter

import pytest
import torch

from danceopd.core.conditioning import Conditioning, concatenate
from danceopd.core.fields import SharedField, counted, guided, routed

EMPTY = torch.zeros(4, dtype=torch.int64)


def batch(n: int, seed: int = 0, source: bool = True):
    g = torch.Generator().manual_seed(seed)
    latents, sigma = torch.randn(n, 3, 4, 4, generator=g), torch.rand(n, generator=g)
    pictures = torch.rand(n, 3, 4, 4, generator=g) if source else None
    has_source = torch.arange(n) % 2 == 0 if source else torch.zeros(n, dtype=torch.bool)
    return latents, sigma, Conditioning(torch.randint(1, 9, (n, 4), generator=g), pictures, has_source)


def field(latents, sigma, c, gain=1.0):
    """Something different for every prompt, noise level and source picture."""
    shape = (-1, 1, 1, 1)
    weight = torch.tensor([1.0, 0.1, 0.01, 0.001])
    prompt = (c.prompt * weight).sum(1).sin().view(shape)
    source = 0 if c.source is None else c.source * c.has_source.view(shape)
    return gain * (prompt * latents.cos() + sigma.view(shape) * latents + prompt * source + source)


def shifted(m):
    return lambda latents, sigma, c: field(latents, sigma, c, gain=m + 1.0)


def by_hand(latents, sigma, c, alpha):
    """The formula, one sample at a time."""
    rows = []
    for i, a in enumerate(alpha):
        one = c[i : i + 1]
        cond = field(latents[i : i + 1], sigma[i : i + 1], one)
        no_prompt = Conditioning(EMPTY[None], one.source, one.has_source)
        uncond = field(latents[i : i + 1], sigma[i : i + 1], no_prompt)
        rows.append(uncond + a * (cond - uncond))
    return torch.cat(rows)


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.5, -1.0, [0.0, 1.0, 2.0, 7.5, 4.0]], ids=str)
def test_guided_is_the_formula(alpha, source):
    latents, sigma, c = batch(5, source=source)
    scales = alpha if isinstance(alpha, list) else [alpha] * 5
    expected = by_hand(latents, sigma, c, scales)
    given_scale = torch.tensor(alpha) if isinstance(alpha, list) else alpha
    torch.testing.assert_close(guided(field, EMPTY, given_scale)(latents, sigma, c), expected)
    c.guidance_scale = torch.tensor(scales)
    torch.testing.assert_close(guided(field, EMPTY)(latents, sigma, c), expected)


def test_guided_asks_one_batch_with_the_sources_in_both_halves():
    latents, sigma, c = batch(3)
    asked = []
    guided(lambda *call: asked.append(call) or field(*call), EMPTY, 2.0)(latents, sigma, c)
    [(z, s, both)] = asked
    assert torch.equal(z, latents.repeat(2, 1, 1, 1))
    assert torch.equal(s, sigma.repeat(2))
    assert torch.equal(both.prompt, torch.cat([c.prompt, EMPTY.expand(3, 4)]))
    assert torch.equal(both.source, c.source.repeat(2, 1, 1, 1))
    assert torch.equal(both.has_source, c.has_source.repeat(2))


@pytest.mark.parametrize("one", [1, 1.0])
def test_scale_one_is_the_same_field(one):
    assert guided(field, EMPTY, one) is field
    assert guided(field, EMPTY, 1.5) is not field


def test_guidance_of_guidance_multiplies():
    """Absorbed alpha under inference scale beta acts as alpha * beta where the empty prompt is unmoved."""
    latents, sigma, c = batch(4)
    empty = Conditioning(EMPTY.expand(4, 4), c.source, c.has_source)
    student = guided(field, EMPTY, 3.0)
    torch.testing.assert_close(student(latents, sigma, empty), field(latents, sigma, empty))
    composed, direct = guided(student, EMPTY, 2.0), guided(field, EMPTY, 6.0)
    torch.testing.assert_close(composed(latents, sigma, c), direct(latents, sigma, c), atol=1e-4, rtol=1e-4)


def test_guided_refuses_scales_of_another_batch():
    latents, sigma, c = batch(1)
    with pytest.raises(ValueError, match="3 guidance scales for a batch of 1"):
        guided(field, EMPTY, torch.tensor([1.0, 2.0, 3.0]))(latents, sigma, c)


@pytest.mark.parametrize(
    "route", [[2, 0, 1, 0, 2, 2], [1] * 6, [0, 2, 0, 2, 0, 2], [0]], ids=lambda r: "".join(map(str, r))
)
def test_routed_asks_each_samples_own_field(route):
    latents, sigma, c = batch(len(route))
    counter = Counter()
    fields = [counted(shifted(m), counter, f"field {m}") for m in range(3)]
    velocity = routed(fields, torch.tensor(route), latents, sigma, c).target()
    for i, m in enumerate(route):
        own = shifted(m)(latents[i : i + 1], sigma[i : i + 1], c[i : i + 1])
        torch.testing.assert_close(velocity[i], own[0])
    assert counter == {f"field {m}": route.count(m) for m in set(route)}  # and no other is even called


def test_routed_has_no_gradient():
    latents, sigma, c = batch(4)
    gain = torch.nn.Parameter(torch.tensor(2.0))
    fields = [lambda z, s, c: gain * field(z, s, c), shifted(0)]
    velocity = routed(fields, torch.tensor([0, 1, 0, 1]), latents.requires_grad_(), sigma, c).target()
    assert not velocity.requires_grad
    assert gain.grad is None
    assert latents.grad is None


def test_a_target_is_in_float32_whatever_the_sources_answer_in():
    latents, sigma, c = batch(4)
    fields = [field, lambda z, s, c: field(z, s, c).bfloat16()]
    answers = routed(fields, torch.tensor([0, 1, 1, 0]), latents, sigma, c)
    assert [velocity.dtype for velocity in answers.velocities] == [torch.float32, torch.bfloat16]  # as they came
    velocity = answers.target()
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, field(latents, sigma, c), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("route", [[0, 2], [-1, 0], [5, 5]], ids=str)
def test_routed_refuses(route):
    counter = Counter()
    with pytest.raises(IndexError, match="routes must lie in"):
        routed([counted(field, counter, "a"), counted(field, counter, "b")], torch.tensor(route), *batch(2))
    assert not counter


def test_counted_counts_samples_and_changes_nothing():
    latents, sigma, c = batch(5)
    counter = Counter()
    watched = counted(field, counter, "teacher")
    assert torch.equal(watched(latents, sigma, c), field(latents, sigma, c))
    watched(latents[:2], sigma[:2], c[:2])
    assert counter == {"teacher": 7}


# Conditioning


@pytest.mark.parametrize(
    "index", [slice(1, 3), torch.tensor([3, 0, 0]), torch.tensor([True, False, False, True])], ids=str
)
@pytest.mark.parametrize("source", [True, False])
def test_conditioning_selects(index, source):
    _, _, c = batch(4, source=source)
    c.guidance_scale = torch.arange(4.0)
    part = c[index]
    assert torch.equal(part.prompt, c.prompt[index])
    assert torch.equal(part.has_source, c.has_source[index])
    assert torch.equal(part.guidance_scale, c.guidance_scale[index])
    assert len(part) == len(part.prompt)
    assert part.source is None if not source else torch.equal(part.source, c.source[index])


def test_sources_of_one_network_are_asked_in_one_forward():
    latents, sigma, c = batch(6)
    calls = []

    def network(z, s, asked):
        calls.append((len(z), asked.adapter.tolist(), asked.guidance_scale.tolist()))
        return z * (asked.adapter + 1).view(-1, 1, 1, 1) + asked.guidance_scale.view(-1, 1, 1, 1)

    one, two = SharedField(network, network, 4, 2.0), SharedField(network, network, 0)
    other = lambda z, s, asked: -z  # noqa: E731
    route = torch.tensor([2, 0, 1, 0, 2, 0])
    counter = Counter()
    fields = [counted(f, counter, "sources") for f in (one, other, two)]
    velocity = routed(fields, route, latents, sigma, c).target()
    assert calls == [(5, [4, 4, 4, 0, 0], [2.0, 2.0, 2.0, 1.0, 1.0])]
    assert counter["sources"] == 6
    for i, m in enumerate(route.tolist()):
        alone = fields[m](latents[i : i + 1], sigma[i : i + 1], c[i : i + 1])
        assert torch.equal(velocity[i], alone[0])


def test_concatenate_keeps_every_source():
    (_, _, a), (_, _, b) = batch(2, seed=1, source=False), batch(3, seed=2)
    for parts, with_source in (([a, b], slice(2, 5)), ([b, a], slice(0, 3))):
        joined = concatenate(parts)
        assert torch.equal(joined.prompt, torch.cat([p.prompt for p in parts]))
        assert torch.equal(joined.has_source, torch.cat([p.has_source for p in parts]))
        assert torch.equal(joined.source[with_source], b.source)
    assert concatenate([a, a]).source is None


def test_prompts_of_several_tensors_and_lengths():
    def encoded(n, length, references):
        prompt = {"prompt_embeds": torch.rand(n, length, 3) + 1, "prompt_mask": torch.ones(n, length, dtype=torch.bool)}
        prompt["pooled"] = torch.rand(n, 5)
        source = tuple(torch.rand(n, 2, 4, 4 + i) for i in range(2)) if references else None
        return Conditioning(prompt, source, torch.full((n,), references))

    short, long = encoded(2, 3, True), encoded(1, 5, False)
    joined = concatenate([short, long])
    assert joined.prompt["prompt_embeds"].shape == (3, 5, 3)
    assert joined.prompt["prompt_mask"].sum(1).tolist() == [3, 3, 5]
    assert (joined.prompt["prompt_embeds"] != 0).any(2).equal(joined.prompt["prompt_mask"])
    assert [s.shape for s in joined.source] == [(3, 2, 4, 4), (3, 2, 4, 5)]
    assert joined.source[1][:2].equal(short.source[1])
    assert not joined.source[1][2].any()
    last = joined[torch.tensor([2, 0])]
    assert last.has_source.tolist() == [False, True]
    assert last.prompt["pooled"].equal(torch.cat([long.prompt["pooled"], short.prompt["pooled"][:1]]))
    empty = last.without_prompt({name: value[0] for name, value in long.prompt.items()})
    assert empty.prompt["prompt_embeds"].equal(long.prompt["prompt_embeds"].expand(2, -1, -1))
    assert empty.source is last.source
    assert len(empty.repeat(3)) == 6


def test_repeat_keeps_a_samples_copies_together():
    _, _, c = batch(3)
    assert torch.equal(c.repeat(2).prompt, c.prompt[torch.tensor([0, 0, 1, 1, 2, 2])])
    assert torch.equal(c.repeat(2).source, c.source[torch.tensor([0, 0, 1, 1, 2, 2])])


def test_guided_asks_the_unconditional_branch_only_where_a_scale_is_not_one():
    latents, sigma, c = batch(4)
    c.guidance_scale = torch.tensor([1.0, 3.0, 1.0, 0.0])
    counter = Counter()
    velocity = guided(counted(field, counter, "field"), EMPTY)(latents, sigma, c)
    assert counter["field"] == 4 + 2
    assert torch.equal(velocity[[0, 2]], field(latents, sigma, c)[[0, 2]])
    assert torch.equal(velocity[3], field(latents, sigma, c.without_prompt(EMPTY))[3])
