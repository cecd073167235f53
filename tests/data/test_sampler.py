"""A batch is a function of seed and step, the same on any number of ranks, and no row comes twice in an epoch."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danceopd.core.conditioning import Conditioning
from danceopd.data.sampler import Group, Samples, draw_batch
from danceopd.support.ranks import Ranks

EMPTY = -1


def condition(rows: range, indices, without_prompt):
    """The row's number in place of its prompt."""
    prompt = torch.tensor([EMPTY if empty else rows[i] for i, empty in zip(indices, without_prompt, strict=True)])
    return Conditioning(prompt[:, None], None, torch.zeros(len(prompt), dtype=torch.bool))


def samples_of(lengths: list[list[int]]) -> Samples:
    """Groups of latents [1 + their place, 4, 4], each with one data set of so many rows a capability."""
    groups = [Group([range(n) for n in each], (1 + g, 4, 4), sum(each)) for g, each in enumerate(lengths)]
    return Samples(groups, condition)


def same(a, b) -> bool:
    return (
        torch.equal(a.noise, b.noise)
        and torch.equal(a.route, b.route)
        and torch.equal(a.conditioning.prompt, b.conditioning.prompt)
    )


lengths = st.integers(1, 3).flatmap(
    lambda m: st.lists(st.lists(st.integers(1, 40), min_size=m, max_size=m), min_size=1, max_size=3)
)
seeds, steps = st.integers(0, 2**40), st.integers(0, 10**6)


@settings(max_examples=60)
@given(lengths, st.integers(1, 5), st.integers(0, 15), seeds, steps, st.booleans(), st.booleans())
def test_the_parts_of_all_ranks_are_one_ranks_batch(lengths, ranks, more, seed, step, in_turn, dropout):
    """Also where they do not divide it."""
    size = ranks + more
    options = {"in_turn": in_turn, "prompt_dropout": [0.4] * len(lengths[0]) if dropout else None}
    asked = [1.0 + m for m in range(len(lengths[0]))], size, seed, step
    whole = draw_batch(samples_of(lengths), *asked, **options)
    assert len(whole) == size
    samples = samples_of(lengths)
    parts = [draw_batch(samples, *asked, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
    first = 0
    for rank, part in enumerate(parts):
        assert len(part) == len(Ranks(rank, ranks).slots(size)) in (size // ranks, size // ranks + 1)
        assert same(part, whole[first : first + len(part)])
        first += len(part)
    assert first == size
    if in_turn:
        assert torch.equal(whole.route, torch.arange(len(whole)) % len(lengths[0]))


@settings(max_examples=40)
@given(lengths, st.integers(1, 9), seeds, st.integers(0, 60), st.booleans())
def test_no_row_comes_twice_in_an_epoch_and_a_run_goes_on_from_anywhere(lengths, batch_size, seed, start, in_turn):
    samples, asked = samples_of(lengths), ([1.0] * len(lengths[0]), batch_size, seed)
    seen = Counter()
    for step in range(start, start + 12):
        batch = draw_batch(samples, *asked, step, in_turn=in_turn)
        assert same(batch, draw_batch(samples_of(lengths), *asked, step, in_turn=in_turn))
        group = batch.noise.shape[1] - 1
        for i, (m, row) in enumerate(zip(batch.route.tolist(), batch.conditioning.prompt[:, 0].tolist(), strict=True)):
            epoch = (step * batch_size + i) // lengths[group][m]
            seen[group, m, epoch, row] += 1
    assert set(seen.values()) == {1}


def test_an_epoch_is_every_row_in_an_order_of_its_own():
    samples = samples_of([[48, 48]])

    def epochs(seed, m, stream=0):
        only = [float(i == m) for i in range(2)]
        drawn = [draw_batch(samples, only, 16, seed, step, stream=stream).conditioning.prompt for step in range(6)]
        return torch.cat(drawn).view(2, 48)

    orders = [order for asked in ((0, 0), (0, 1), (1, 0), (0, 0, 2)) for order in epochs(*asked)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(48))
    assert len({tuple(order.tolist()) for order in orders}) == 8


def test_two_groups_with_the_same_rows_go_through_them_together():
    """Rows without source pictures stand in several groups: an epoch is of their slots, whichever group has them."""
    samples = Samples([Group([range(40)], (1, 2, 2), 1), Group([range(40)], (2, 2, 2), 1)], condition)
    batches = [draw_batch(samples, [1.0], 4, 0, step) for step in range(10)]
    assert {batch.noise.shape[1] for batch in batches} == {1, 2}
    assert torch.cat([batch.conditioning.prompt for batch in batches])[:, 0].sort().values.equal(torch.arange(40))


def test_groups_are_drawn_by_their_rows():
    samples = Samples([Group([range(9)], (1, 1, 1), 1.5), Group([range(9)], (2, 1, 1), 4.5)], condition)
    n = 600
    first = sum(draw_batch(samples, [1.0], 1, 0, step).noise.shape[1] == 1 for step in range(n))
    assert first / n == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / n) ** 0.5)


def test_noise_is_normal_and_each_slots_own():
    samples = Samples([Group([range(9)], (4, 4, 4), 9)], condition)
    noise = torch.cat([draw_batch(samples, [1.0], 64, 3, step).noise for step in range(64)]).flatten(1).double()
    n = noise.numel()
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.square().mean() - 1) < 4 * (2 / n) ** 0.5
    for apart in (1, 2, 64):  # seeds of neighbours are neighbours
        assert abs((noise[apart:] * noise[:-apart]).mean()) < 4 / (n - apart * 64) ** 0.5
    assert len(noise[:, 0].unique()) == len(noise)
    other = draw_batch(samples, [1.0], 64, 4, 0).noise.flatten(1).double()
    assert not (noise[:, :1] == other[:, 0]).any()
