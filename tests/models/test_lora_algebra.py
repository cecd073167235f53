"""Sums of LoRAs."""

from copy import deepcopy

from small_loras import close, random_lora, small_sd3

from danceopd.models.lora_algebra import merge_into, sum_loras


def test_combined_loras_are_their_sum():
    transformer = small_sd3()
    one = random_lora(transformer, ("to_q", "net.2"), 2, 1, scale=0.7)
    two = random_lora(transformer, ("to_q", "to_v"), 3, 2, scale=-1.5)
    both = sum_loras([one, two])
    assert both.keys() == one.keys() | two.keys()
    once, twice = merge_into(deepcopy(transformer), both), merge_into(merge_into(deepcopy(transformer), one), two)
    for got, expected in zip(once.parameters(), twice.parameters(), strict=True):
        close(got, expected)
