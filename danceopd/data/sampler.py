"""One update's samples: routes, data rows and noise, as a function of the seed and the step alone."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning, concatenate
from danceopd.core.randomness import _number, step_generator
from danceopd.core.routing import round_robin, route
from danceopd.support.ranks import Ranks


@dataclass(frozen=True)
class Group:
    """Holds samples that may share a batch: one data set a capability, their latents' shape, and how many rows it adds.

    Attributes:
        data: A data set for each capability, in the order of the routes.
        shape: The shape of one sample's latents.
        rows: The weight by which groups are drawn; a fraction where rows stand in several groups.
        sigmas: float32 tensor [N + 1], the noise levels of a rollout of this shape, where they are the model's and not
            the configuration's.
        source_shapes: The shape of each source picture's latents.
    """

    data: list
    shape: tuple[int, ...]
    rows: float
    sigmas: torch.Tensor | None = None
    source_shapes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Samples:
    """Holds what batches are drawn from.

    Attributes:
        groups: The samples, in groups of which a batch takes one.
        condition: ``condition(data, indices, without_prompt)`` gives what rows of a data set are conditioned on.
        never_drawn: Lines about rows that are in no group.
    """

    groups: list[Group]
    condition: Callable[[object, list[int], list[bool]], Conditioning]
    never_drawn: tuple[str, ...] = ()
    _orders: dict = field(default_factory=dict, repr=False)  # each data set's rows in the order of its newest epoch

    def rows_at(self, slots: torch.Tensor, length: int, *seed: int) -> list[int]:
        """Finds the row that each slot asks for: each row once in an epoch of `length` slots, in random order.

        Args:
            slots: int64 tensor [n], numbers of samples of the run.
            length: Number of rows of the data set.
            seed: Whole numbers that the order depends on.

        Returns:
            n numbers of rows.
        """
        epochs, rows = slots // length, torch.empty_like(slots)
        for epoch in epochs.unique().tolist():
            if (known := self._orders.get((length, *seed))) is None or known[0] != epoch:
                generator = torch.Generator().manual_seed(_number(*seed, epoch))
                known = epoch, torch.randperm(length, generator=generator, dtype=torch.int32)
                self._orders[(length, *seed)] = known
            here = epochs == epoch
            rows[here] = known[1][slots[here] % length].long()
        return rows.tolist()


# Long: half of it says what the arguments are.
def draw_batch(
    samples: Samples,
    weights: list[float],
    batch_size: int,
    seed: int,
    step: int,
    guidance_scales: list[float | None] | None = None,
    *,
    in_turn: bool = False,
    group: int = 1,
    alike: bool = False,
    prompt_dropout: list[float] | None = None,
    with_clean: bool = False,
    rank: int = 0,
    world_size: int = 1,
    stream: int = 0,
) -> Batch:
    """Draws a rank's part of a step's batch: a group by its rows, a capability a sample, a row of its data, noise.

    The batch is a function of (seed, stream, step) alone: a run goes on from any step without any state, and the parts
    of `world_size` ranks, equal up to one sample, are one rank's batch in order. Slot i of step s is
    number n = s * batch_size + i of the run; it asks for row n modulo their number of the rows of its
    capability and group, in an order that is new in each epoch of so many slots. So no row is drawn twice in an epoch,
    on whatever ranks; which of them are drawn is left to the routes, that share the slots out among the capabilities.

    Args:
        samples: What is drawn from.
        weights: How often each capability is drawn, in the order of the routes.
        batch_size: Number of samples of all ranks.
        seed: The run's.
        step: The number of the update.
        guidance_scales: The student's own scale for each capability's samples; None gives them none.
        in_turn: Takes equal parts of the capabilities, whatever their weights.
        group: So many samples in a row have one turn: those of which a method takes the first one's route.
        alike: Takes one capability for all samples of the step.
        prompt_dropout: The share of each capability's prompts that is left empty.
        with_clean: Adds the data's own pictures.
        rank: This process's number.
        world_size: Number of processes.
        stream: Tells apart what is drawn for different ends.

    Returns:
        The samples, on the CPU.
    """
    generator = step_generator(seed, step, stream)
    kind = samples.groups[0]
    if len(samples.groups) > 1:
        rows = torch.tensor([float(g.rows) for g in samples.groups])
        kind = samples.groups[int(torch.multinomial(rows, 1, generator=generator))]
    routes = route(batch_size, torch.tensor(weights), generator)
    if in_turn:  # drawn all the same, so that what is drawn after them does not depend on it
        routes = round_robin(-(-batch_size // group), len(kind.data)).repeat_interleave(group)[:batch_size]
    if alike:
        routes = routes[:1].expand(batch_size)
    empty = torch.rand(batch_size, generator=generator, dtype=torch.float64) if prompt_dropout else None
    own = Ranks(rank, world_size).slots(batch_size)
    mine = slice(own.start, own.stop)
    slots = step * batch_size + torch.arange(batch_size)[mine]
    routes, empty = routes[mine], None if empty is None else empty[mine]
    noise = torch.empty(len(slots), *kind.shape)
    for slot, out in zip(slots.tolist(), noise, strict=True):  # each by itself: no rank draws another's
        out.normal_(generator=generator.manual_seed(_number(seed, stream) + slot))
    parts, position, clean = [], [], []
    for m, rows in enumerate(kind.data):
        drawn = (routes == m).nonzero()[:, 0]
        if not len(drawn):
            continue
        indices = samples.rows_at(slots[drawn], len(rows), seed, stream, m)
        without = (empty[drawn] < prompt_dropout[m]).tolist() if prompt_dropout else [False] * len(drawn)
        part = samples.condition(rows, indices, without)
        if guidance_scales is not None and guidance_scales[m] is not None:
            part.guidance_scale = torch.full((len(drawn),), float(guidance_scales[m]))
        if with_clean:
            clean.append(rows.targets(indices))
        parts.append(part)
        position.append(drawn)
    order = torch.cat(position).argsort()
    pictures = torch.cat(clean)[order] if with_clean else None
    return Batch(noise, concatenate(parts)[order], routes, pictures, kind.sigmas)
