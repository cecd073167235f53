"""Sums of LoRAs."""

from copy import deepcopy

import pytest
import torch
from small_loras import close, random_lora, small_sd3

from danceopd.models.lora_algebra import cut, merge_into, squared_norms, sum_loras


def test_combined_loras_are_their_sum():
    transformer = small_sd3()
    one = random_lora(transformer, ("to_q", "net.2"), 2, 1, scale=0.7)
    two = random_lora(transformer, ("to_q", "to_v"), 3, 2, scale=-1.5)
    both = sum_loras([one, two])
    assert both.keys() == one.keys() | two.keys()
    once, twice = merge_into(deepcopy(transformer), both), merge_into(merge_into(deepcopy(transformer), one), two)
    for got, expected in zip(once.parameters(), twice.parameters(), strict=True):
        close(got, expected)


def test_norms_are_those_of_the_whole_changes():
    lora = random_lora(small_sd3(), ("to_q", "net.2"), 3, 1, scale=-1.5)
    for name, norm in squared_norms(lora).items():
        a, b, scale = lora[name]
        assert norm == pytest.approx((scale * b @ a).double().square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 99])
def test_a_cut_is_the_best_of_its_rank_and_says_what_it_leaves_out(rank):
    lora = random_lora(small_sd3(), ("to_q", "net.2"), 6, 1, scale=0.5)
    lora["full"] = (torch.eye(16), torch.randn(16, 16, generator=torch.Generator().manual_seed(1)), 2.0)
    short, lost = cut(lora, rank)
    left = whole = 0.0
    for name, (a, b, scale) in lora.items():
        change = scale * b @ a
        u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        own_a, own_b, own_scale = short[name]
        assert len(own_a) <= rank
        close(own_scale * own_b @ own_a, best.float(), 1e-4)
        left, whole = left + s[rank:].square().sum(), whole + s.square().sum()
    assert lost == pytest.approx((left / whole).sqrt().item(), abs=1e-3)
