"""How an update asks: the student as a field, with gradient and without."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from danceopd.config.sections import Config
from danceopd.core.copies import ON_HOST
from danceopd.core.fields import Field, counted, guided, within
from danceopd.data.sampler import Group
from danceopd.models.forward_cost import Cost, forward_cost
from danceopd.support.ranks import Ranks
from danceopd.training.rollouts.capture import Pool
from danceopd.training.rollouts.layouts import always_guided
from danceopd.training.rollouts.static import StaticField
from danceopd.training.rollouts.trained import StaticStudent
from danceopd.training.rows import Rows, choose_rows, in_parts


def guidance_scales(config: Config) -> list[float] | None:
    """Lists the student's own guidance scale for each capability's samples.

    Args:
        config: The run's.

    Returns:
        A number for each capability, in the order of the routes; None where all are 1.
    """
    scales = [capability.student_guidance_scale for capability in config.capabilities.values()]
    return None if all(scale == 1 for scale in scales) else scales


def as_student(config: Config, parts, network: Field) -> Field:
    """Makes a network the field that is trained: in the training's precision, guided by each sample's own scale.

    Args:
        config: The run's.
        parts: Its `Parts`, of which the empty prompt and the combination are read.
        network: The student's, or another in its place.

    Returns:
        The field.
    """
    velocity = in_precision(config, parts.device, network)
    if guidance_scales(config) is None:
        return velocity
    return guided(velocity, parts.empty_prompt, combine=parts.combine)


def in_precision(config: Config, device: torch.device, network: Field) -> Field:
    """Asks a network in the student's precision.

    Args:
        config: The run's.
        device: Where the network lies.
        network: The network as a field.

    Returns:
        The field, under autocast where the precision is bf16 and the network is the embedded one.
    """
    bf16 = config.training.precision == "bf16" and not config.model

    def velocity(latents, sigma, conditioning):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            return network(latents, sigma, conditioning)

    return velocity


def rolled_out(
    config: Config,
    parts,
    network: nn.Module | None,
    field: Field,
    rows: Rows,
    spent: Counter,
    pool: Pool | None = None,
) -> Field:
    """Makes the student the field that is asked without gradient, by static steps where these are wanted.

    Args:
        config: The run's.
        parts: Its `Parts`.
        network: The engine's `resident`, which static steps read; None where there is none.
        field: The engine's `rolled`, counted and in as many rows at a time as fit.
        rows: How many rows a static step takes at most.
        spent: Counts the evaluations of static steps.
        pool: As `pool_of_run` makes it.

    Returns:
        The student as a field, which may bring a rollout of its own.
    """
    field = as_student(config, parts, field)
    if not in_graphs(config, parts) or network is None:
        return field
    ask, both = in_precision(config, parts.device, network), None
    if guidance_scales(config) is not None:
        both = always_guided(ask, parts.empty_prompt, parts.combine)
    on_card = parts.device.type not in ON_HOST
    return StaticField(field, ask, both, _read(network), capture=on_card, spent=spent, rows=rows, pool=pool)


def in_graphs(config: Config, parts) -> bool:
    """Tells whether a run's networks are asked in static steps: by training.cuda_graphs, and if "auto" on a card."""
    wanted = config.training.cuda_graphs
    if wanted == "auto":  # a graph would read blocks that have left again
        return parts.device.type not in ON_HOST and config.training.swap_blocks is None
    return wanted


def pool_of_run(config: Config, parts) -> Pool | None:
    """Makes what a run's graphs share; None where it captures none."""
    return Pool(parts.device) if in_graphs(config, parts) and parts.device.type not in ON_HOST else None


def static_student(config: Config, parts, engine, static: bool, pool: Pool | None) -> Field:
    """Makes the network that is trained a field, asked by static passes if that is wanted.

    Args:
        config: The run's.
        parts: Its `Parts`.
        engine: Holds the student.
        static: Whether it is asked by static passes, for which all of its weights must be here.
        pool: As `pool_of_run` makes it.

    Returns:
        The field.
    """
    if not static:
        return lambda *asked: engine.student(*asked)
    return StaticStudent(in_precision(config, parts.device, engine.student), _read(engine.student), pool)


def static_sources(config: Config, parts, static: bool, pool: Pool | None, rows: Rows, spent: Counter) -> list[Field]:
    """Makes the sources fields that take as many rows at a time as fit, in static steps if that is wanted.

    Args:
        config: The run's.
        parts: Its `Parts`.
        static: Whether they are asked in static steps, for which all of their weights must be here.
        pool: As `pool_of_run` makes it.
        rows: How many rows a step takes at most.
        spent: Counts their evaluations, by "sources".

    Returns:
        The field of each route.
    """
    on_card, made = parts.device.type not in ON_HOST, {}  # by network, of which several sources may be
    static = static and not config.training.offload_sources

    def wrap(network: Field) -> Field:
        field = counted(in_parts(network, rows), spent, "sources")
        if not static:
            return field
        if id(network) not in made:
            # Their weights are frozen and stay where they are: nobody need look.
            steps = StaticField(field, network, capture=on_card, spent=spent, name="sources", rows=rows, pool=pool)
            made[id(network)] = network, in_parts(steps.once, rows)
        return made[id(network)][1]

    return [within(field, wrap) for field in parts.fields]


def _read(network: nn.Module) -> list[nn.Module]:
    """Lists a network and the frozen one under its adapter, which is no part of it."""
    return list(dict.fromkeys([network, getattr(network, "transformer", network)]))


def rows_of_run(config: Config, parts, rolled: Field, ranks: Ranks) -> Rows:
    """Chooses how many rows a run's forwards without gradient take.

    ``auto`` measures one row of each capability, at the largest picture size.

    Args:
        config: The run's.
        parts: Its `Parts`.
        rolled: The engine's network that is asked without gradient.
        ranks: The processes that share each batch.

    Returns:
        The rows to begin with.
    """
    group = max(parts.samples.groups, key=lambda g: sum(map(math.prod, (g.shape, *g.source_shapes))))

    def ask_one():
        for ask in _one_row_each(config, parts, rolled, group).values():
            ask()

    # Gradients and the optimizer's two states come with the first update.
    reserved = 12 * sum(p.numel() for p in parts.student.parameters() if p.requires_grad)
    most = -(-config.training.batch_size // ranks.size)  # the same on all ranks: they ask together
    return choose_rows(config.training.rollout_batch_size, most, ask_one, parts.device, reserved)


def costs_of_run(config: Config, parts, rolled: Field) -> dict[int, Cost]:
    """Counts what a forward of one sample computes, at the smallest and the largest picture size.

    Args:
        config: The run's.
        parts: Its `Parts`.
        rolled: The engine's network that is asked without gradient, before anything of it is compiled.

    Returns:
        The costs by the number of entries of a sample's latents: the means over the capabilities, by their weights.
    """
    by_size = {math.prod(group.shape): group for group in parts.samples.groups}
    weights = [capability.weight for capability in config.capabilities.values()]
    found: dict[int, Cost] = {}
    for size in {min(by_size), max(by_size)}:
        asks = _one_row_each(config, parts, rolled, by_size[size])
        each = [(weights[m], forward_cost(ask)) for m, ask in asks.items()]
        whole = sum(weight for weight, _ in each)
        if not whole:  # none of this size is drawn
            continue
        found[size] = Cost(*(sum(w * getattr(c, name) for w, c in each) / whole for name in ("operations", "tokens")))
    return found


def _one_row_each(config: Config, parts, rolled: Field, group: Group) -> dict[int, Callable[[], object]]:
    """Gives what asks for one row of each capability of a group; they belong to no update, and so are not counted."""
    one = in_precision(config, parts.device, rolled)
    latents, sigma = torch.zeros(1, *group.shape, device=parts.device), torch.ones(1, device=parts.device)

    def asking(rows):
        return lambda: one(latents, sigma, parts.samples.condition(rows, [0], [False]).to(parts.device))

    return {m: asking(rows) for m, rows in enumerate(group.data) if len(rows)}
