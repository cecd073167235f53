"""Forwards of samples with and without source pictures, and of prompts of different length."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch

from danceopd.core.conditioning import Conditioning, with_length
from danceopd.core.copies import to_device

FORWARD = 0.05  # what a forward more costs, as a share of a sample's tokens, and the most that may be padding

# Counts the tokens of prompts and pictures that forwards computed where prompts have a mask, and those of them that
# were padding. It counts for the whole process: who wants to know takes the difference.
TOKENS: Counter = Counter()

# Counts the forwards of each shape of attention where prompts have a mask: (samples, tokens of pictures, tokens of
# prompts, whether a mask was left). It counts for the whole process too.
SHAPES: Counter = Counter()

_whole: ContextVar[bool] = ContextVar("whole", default=False)


def by_sources(ask: Callable, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    """Asks a transformer that takes source pictures, and prompts of one length, for all of a batch.

    Samples with sources and those without are two forwards, and each of them is as many as `split_by_length` says where
    prompts have a prompt_mask: the prompts of each are cut to its longest, and have no mask where all are as long. One
    transformer's samples do not see each other, so that the velocity is the same.

    Args:
        ask: ``ask(latents, sigma, conditioning, sources, rows)`` makes one forward of the samples `rows` [n] int64 on
            the CPU of the batch (None: of all) with sources, a tuple of [n, C, h, w] or ().
        latents: Float tensor [B, ...].
        sigma: Float tensor [B].
        conditioning: What the B samples are conditioned on.

    Returns:
        The velocity [B, ...].
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
        there = None if rows is None else to_device(rows, latents.device)
        own = (latents, sigma) if there is None else (latents[there], sigma[there])
        velocity = ask(*own, part, _sources(part), rows)
        result = velocity if result is None else result.index_copy(0, there, velocity)
    return result


def _by_length(latents, rows: torch.Tensor | None, part: Conditioning) -> list[tuple]:
    """Lists the samples and their conditioning for each forward of these rows, all with source pictures or none."""
    if not isinstance(part.prompt, dict) or "prompt_mask" not in part.prompt:
        return [(rows, part)]
    lengths, picture = part.prompt["prompt_mask"].sum(1).tolist(), picture_tokens(latents, _sources(part))
    split = [list(range(len(lengths)))] if _whole.get() else split_by_length(lengths, picture)
    groups = []
    for own in split:
        longest, shortest = max(lengths[i] for i in own), min(lengths[i] for i in own)
        TOKENS["computed"] += len(own) * (picture + longest)
        TOKENS["padding"] += len(own) * longest - sum(lengths[i] for i in own)
        SHAPES[len(own), picture, longest, shortest != longest] += 1
        there = torch.tensor(own) if len(split) > 1 else None
        samples = part if there is None else part[there]
        prompt = with_length(samples.prompt, longest)
        if shortest == longest:
            del prompt["prompt_mask"]
        where = rows if there is None else there if rows is None else rows[there]
        groups.append((where, replace(samples, prompt=prompt)))
    return groups


def split_by_length(lengths: Sequence[int], picture: int) -> list[list[int]]:
    """Groups samples of similar length, each group to be a forward whose prompts are cut to its longest.

    Of all ways to cut the sorted samples, it takes the one of least padding where a forward more costs as much as
    `FORWARD` of a mean sample's tokens. As taking each sample alone would save all padding for less than so much a
    sample, what is left is under that share of all tokens.

    Args:
        lengths: Tokens of each sample's prompt.
        picture: Tokens of a sample's pictures.

    Returns:
        The samples of each group, by their place in lengths.

    Example:
        >>> split_by_length([100, 10, 11, 99], 0)
        [[0, 3], [1, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    price = FORWARD * (picture + sum(lengths) / len(lengths))
    best, begin = [0.0], [0]  # the least cost of the first `end` samples, and where their last group begins
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
    """Counts the tokens of one sample's pictures: 2 x 2 latents each, in both families whose prompts have a mask.

    Args:
        latents: Float tensor [B, C, h, w].
        sources: The source pictures' latents, each [B, C, h, w].

    Returns:
        The number of tokens.
    """
    return sum(math.prod(picture.shape[2:]) // 4 for picture in (latents, *sources))


def _sources(conditioning: Conditioning) -> tuple[torch.Tensor, ...]:
    """Returns the source pictures' latents as a tuple."""
    source = conditioning.source
    return () if source is None else source if isinstance(source, tuple) else (source,)


def each_length(
    ask: Callable, latents: torch.Tensor, sigma: torch.Tensor, prompt: dict, sources: tuple
) -> torch.Tensor:
    """Asks for the samples of each length of prompt by themselves, where a prompt's length changes the result.

    Args:
        ask: ``ask(latents, sigma, prompt, sources)`` makes one forward of prompts of one length, without a mask.
        latents: Float tensor [B, C, h, w].
        sigma: Float tensor [B].
        prompt: A prompt's dict; without a ``prompt_mask`` all are of one length.
        sources: The source pictures' latents, each [B, C, h, w].

    Returns:
        The velocity [B, C, h, w].
    """
    if "prompt_mask" not in prompt:
        return ask(latents, sigma, prompt, sources)
    lengths, result = prompt["prompt_mask"].sum(1), torch.empty_like(latents)
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero()[:, 0]
        own = with_length(Conditioning(prompt)[rows].prompt, length)
        del own["prompt_mask"]
        there = to_device(rows, latents.device)
        part = ask(latents[there], sigma[there], own, tuple(source[there] for source in sources))
        result = result.index_copy(0, there, part)
    return result


def in_whole_batches() -> bool:
    """Tells whether prompts of different length are to be one forward here, since ranks agree on their number."""
    return _whole.get()


@contextmanager
def whole_batches() -> Iterator[None]:
    """Makes prompts of different length one forward inside, where ranks agree on the number of forwards.

    Returns:
        The context.
    """
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)
