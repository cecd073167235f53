"""Merges of LoRAs against PEFT's own add_weighted_adapter, and the automatic rank against a full SVD in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from danceopd.models.lora_merges import COMBINATIONS, KEPT, SEED, automatic_rank, combined

SIZES = {"one": (6, 5), "two": (4, 7)}  # (out, in)


def lora(seed: int, rank: int, layers=tuple(SIZES), scale: float = 1.0):
    """Random factors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, SIZES[name][1], generator=generator),
            torch.randn(SIZES[name][0], rank, generator=generator),
            scale,
        )
        for name in layers
    }


def added(loras, name: str) -> torch.Tensor:
    """What a LoRA adds to a layer, zero where it leaves it."""
    out = torch.zeros(SIZES[name])
    return out + sum(scale * b @ a for a, b, scale in [loras[name]]) if name in loras else out


def by_peft(loras, kind: str, weights, rank: int) -> dict[str, torch.Tensor]:
    """What PEFT's merged adapter adds to each layer."""
    network = nn.ModuleDict({name: nn.Linear(i, o, bias=False) for name, (o, i) in SIZES.items()})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(SIZES))
    model = get_peft_model(network, config, adapter_name="0")
    for i in range(1, len(loras)):
        model.add_adapter(str(i), config)
    with torch.no_grad():
        for i, one in enumerate(loras):
            for name in SIZES:
                layer = network[name]
                layer.lora_A[str(i)].weight.zero_()
                layer.lora_B[str(i)].weight.zero_()
                if name in one:
                    a, b, scale = one[name]
                    layer.lora_A[str(i)].weight[: len(a)] = scale**0.5 * a
                    layer.lora_B[str(i)].weight[:, : len(a)] = scale**0.5 * b
    inject = model.base_model.inject_adapter

    def inject_and_seed(*args, **kwargs):  # making the adapter draws numbers, which are not those of dare
        inject(*args, **kwargs)
        torch.manual_seed(SEED)

    model.base_model.inject_adapter = inject_and_seed
    density = 0.5 if any(word in kind for word in ("ties", "dare", "prune")) else None
    names = [str(i) for i in range(len(loras))]
    model.add_weighted_adapter(names, list(weights), "merged", combination_type=kind, density=density)
    return {name: network[name].get_delta_weight("merged").detach() for name in SIZES}


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_merge_is_pefts(kind, scale):
    loras = [lora(1, 2, scale=scale), lora(2, 3, ("one",)), lora(3, 3)]
    state = torch.get_rng_state()
    merged = combined(loras, kind, [0.6, 0.8, 0.6])
    assert torch.get_rng_state().equal(state)
    expected = by_peft(loras, kind, [0.6, 0.8, 0.6], 3)
    for name in SIZES:
        torch.testing.assert_close(added(merged, name), expected[name], atol=2e-5, rtol=1e-4)
    largest = max(len(a) for a, _, _ in merged.values())
    assert largest == (8 if kind == "cat" else 3)


def test_an_unknown_merge_is_refused():
    with pytest.raises(ValueError, match="unknown combination 'sum'"):
        combined([lora(1, 2)], "sum", [1.0])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 3))
def test_the_automatic_rank_keeps_the_share_and_one_less_does_not(seed, first, second, scale):
    loras = [lora(seed, first), lora(seed + 1, second, scale=scale)]
    spectra = [torch.linalg.svdvals(sum(added(one, name).double() for one in loras)).square() for name in SIZES]
    whole = sum(float(squares.sum()) for squares in spectra)

    def kept(rank: int) -> float:
        return sum(float(squares[:rank].sum()) for squares in spectra) / whole

    rank = automatic_rank(loras)
    assert kept(rank) >= KEPT - 1e-5
    assert rank == 1 or kept(rank - 1) < KEPT + 1e-5


def test_equal_loras_need_no_more_than_the_rank_of_one():
    one = lora(4, 2)
    assert automatic_rank([one, one]) <= 2
    assert automatic_rank([{name: (a, 0 * b, s) for name, (a, b, s) in one.items()}]) == 1
