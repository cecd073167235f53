"""Forwards of samples with and without source pictures, and of prompts of different length."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch

from danceopd.core.conditioning import Conditioning, with_length

FORWARD = 0.05  # what a forward more costs, as a share of a sample's tokens, and the most that may be padding

# Of prompts and pictures, in forwards where prompts have a mask: how many were computed, and how many of them for
# nothing. For the whole process: who wants to know takes the difference.
TOKENS: Counter = Counter()

_whole: ContextVar[bool] = ContextVar("whole", default=False)


def by_sources(ask: Callable, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """The velocity [B, ...] of a transformer that takes source pictures, and prompts of one length, for all of a batch.

    ask(latents, sigma, conditioning, sources, rows): one forward, of the samples `rows` [n] int64 of the batch (None:
    of all) with sources, a tuple of [n, C, h, w] or (). Samples with sources and those without are two forwards, and
    each of them is as many as `split_by_length` says where prompts have a prompt_mask: the prompts of each are cut to
    its longest, and have no mask where all are as long. The masks are read for it. One transformer's samples do not
    see each other, so that the velocity is the same.
    """
    sourced, has = conditioning.sourced(), conditioning.has_source
    if sourced is None:
        edits, others = has.nonzero()[:, 0], (~has).nonzero()[:, 0]
        kinds = [(edits, conditioning[edits]), (others, replace(conditioning[others], source=None))]
    else:
        kinds = [(None, conditioning if sourced else replace(conditioning, source=None))]
    groups = [group for kind in kinds for group in _by_length(latents, *kind)]
    result = torch.empty_like(latents) if len(groups) > 1 else None
    for rows, part in groups:
        own = (latents, sigma) if rows is None else (latents[rows], sigma[rows])
        velocity = ask(*own, part, _sources(part), rows)
        result = velocity if result is None else result.index_copy(0, rows, velocity)
    return result


def _by_length(latents, rows: torch.Tensor | None, part: Conditioning) -> list[tuple]:
    """[(samples of the batch, their conditioning)] for each forward of these rows, all with source pictures or none."""
    if not isinstance(part.prompt, dict) or "prompt_mask" not in part.prompt:
        return [(rows, part)]
    lengths, picture = part.prompt["prompt_mask"].sum(1).tolist(), picture_tokens(latents, _sources(part))
    split = [list(range(len(lengths)))] if _whole.get() else split_by_length(lengths, picture)
    groups = []
    for own in split:
        longest, shortest = max(lengths[i] for i in own), min(lengths[i] for i in own)
        TOKENS["computed"] += len(own) * (picture + longest)
        TOKENS["padding"] += len(own) * longest - sum(lengths[i] for i in own)
        there = torch.tensor(own, device=latents.device) if len(split) > 1 else None
        samples = part if there is None else part[there]
        prompt = with_length(samples.prompt, longest)
        if shortest == longest:
            del prompt["prompt_mask"]
        where = rows if there is None else there if rows is None else rows[there]
        groups.append((where, replace(samples, prompt=prompt)))
    return groups


def split_by_length(lengths: Sequence[int], picture: int) -> list[list[int]]:
    """Samples in groups of similar length, each to be a forward whose prompts are cut to its longest.

    lengths: tokens of each sample's prompt; picture: those of its pictures. Of all ways to cut the sorted samples, the
    one of least padding where a forward more costs as much as `FORWARD` of a mean sample's tokens. As taking each
    sample alone would save all padding for less than so much a sample, what is left is under that share of all tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    price = FORWARD * (picture + sum(lengths) / len(lengths))
    best, begin = [0.0], [0]  # of the first `end` samples: the least cost, and where their last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [best[start] + price + (end - start) * longest for start in range(end)]
        begin.append(min(range(end), key=costs.__getitem__))
        best.append(costs[begin[-1]])
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[begin[end] : end]))
        end = begin[end]
    return groups


def picture_tokens(latents: torch.Tensor, sources: Sequence[torch.Tensor]) -> int:
    """Of one sample: 2 x 2 latents each, in both families whose prompts have a mask."""
    return sum(math.prod(picture.shape[2:]) // 4 for picture in (latents, *sources))


def _sources(conditioning: Conditioning) -> tuple[torch.Tensor, ...]:
    source = conditioning.source
    return () if source is None else source if isinstance(source, tuple) else (source,)


@contextmanager
def whole_batches() -> Iterator[None]:
    """Inside, prompts of different length are one forward: where ranks agree on the number of forwards."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)
