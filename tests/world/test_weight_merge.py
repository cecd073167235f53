"""Merges of LoRA adapters against the arithmetic of the layers' differences."""

import copy

import pytest
import torch

from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.weight_merge import COMBINATIONS, as_lora, lora_merge, weight_merge

TINY = DiTConfig(width=16, depth=1, heads=2, mlp_ratio=2, text_length=4)


def network(seed: int) -> DiT:
    torch.manual_seed(seed)
    made = DiT(TINY)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    return made.eval()


@pytest.fixture(scope="module")
def networks():
    return network(0), [network(1), network(2)]


def linear_weights(model: DiT) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def combined(base: DiT, sources: list[DiT], weights: list[float]) -> dict[str, torch.Tensor]:
    """Each layer by hand: the base's weight plus the weighted differences."""
    own, theirs = linear_weights(base), [linear_weights(s) for s in sources]
    return {n: w + sum(a * (t[n] - w) for a, t in zip(weights, theirs, strict=True)) for n, w in own.items()}


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_of_full_rank_is_the_sum_of_differences(networks, kind):
    base, sources = networks
    # No layer of this network has a rank above 32, and none but the last above 16; PEFT's svd takes no rank above
    # a layer's smaller side.
    merged = lora_merge(base, sources, kind, [0.3, 0.6], rank=16 if kind == "svd" else 32)
    assert type(merged) is DiT
    expected = combined(base, sources, [0.3, 0.6])
    for name, weight in linear_weights(merged).items():
        if kind == "cat" or name != "patch_out":
            torch.testing.assert_close(weight, expected[name], atol=2e-5, rtol=1e-4)
    for name, value in merged.state_dict().items():  # what is no linear layer's weight stays the base's
        if name.removesuffix(".weight") not in expected:
            assert torch.equal(value, base.state_dict()[name]), name


def test_one_adapter_alone_is_its_network(networks):
    base, sources = networks
    for kind in ("linear", "cat"):
        merged = lora_merge(base, sources[:1], kind, [1.0], rank=64)
        for name, weight in linear_weights(merged).items():
            torch.testing.assert_close(weight, linear_weights(sources[0])[name], atol=2e-5, rtol=1e-4)


def test_a_lower_rank_keeps_the_largest_singular_values(networks):
    base, sources = networks
    rank = 3
    layers = dict(as_lora(base, sources[:1], rank).base_model.model.named_modules())
    for name, weight in linear_weights(base).items():
        difference = linear_weights(sources[0])[name] - weight
        kept = (layers[name].lora_B["0"].weight @ layers[name].lora_A["0"].weight).detach()
        singular = torch.linalg.svdvals(difference)
        assert (difference - kept).norm() == pytest.approx(float(singular[rank:].norm()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_every_combination_makes_a_network_and_leaves_its_parts(networks, kind):
    base, sources = networks
    before = [copy.deepcopy(m.state_dict()) for m in (base, *sources)]
    one, two = (lora_merge(base, sources, kind, [0.5, 0.5], rank=4) for _ in range(2))
    assert all(torch.isfinite(p).all() for p in one.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(one.state_dict()[k], v) for k, v in before[0].items())
    for state, model in zip(before, (base, *sources), strict=True):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_ties_drops_the_smaller_entries(networks):
    base, sources = networks
    dense, sparse = (lora_merge(base, sources, "ties", [0.5, 0.5], rank=4, density=d) for d in (0.9, 0.1))
    moved = [sum(float((m.state_dict()[k] - v).norm()) for k, v in base.state_dict().items()) for m in (dense, sparse)]
    assert 0 < moved[1] < moved[0]


def test_an_unknown_combination_is_refused(networks):
    with pytest.raises(ValueError, match="linear, cat, svd, ties, dare_ties"):
        lora_merge(networks[0], networks[1], "magnitude", [1.0, 1.0])


def test_weight_merge_is_the_arithmetic():
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(DiT(DiTConfig(width=32, depth=1, heads=2)))
    merged = weight_merge(networks, [1, 2, 1]).state_dict()
    for key, value in merged.items():
        a, b, c = (network.state_dict()[key].double() for network in networks)
        torch.testing.assert_close(value.double(), (a + 2 * b + c) / 4, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="one configuration"):
        weight_merge([networks[0], DiT(DiTConfig(width=64, depth=1))])
    with pytest.raises(ValueError, match="positive sum"):
        weight_merge(networks, [0, 0, 0])
