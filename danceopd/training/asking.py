"""How an update asks: the student as a field, with gradient and without."""

import math
from collections import Counter

import torch
from torch import nn

from danceopd.config.sections import Config
from danceopd.core.copies import ON_HOST
from danceopd.core.fields import Field, guided
from danceopd.support.ranks import Ranks
from danceopd.training.rollouts.layouts import always_guided
from danceopd.training.rollouts.static import StaticField
from danceopd.training.rows import Rows, choose_rows


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


def rolled_out(config: Config, parts, network: nn.Module | None, field: Field, rows: Rows, spent: Counter) -> Field:
    """Makes the student the field that is asked without gradient, by static steps where these are wanted.

    Args:
        config: The run's.
        parts: Its `Parts`.
        network: The engine's `resident`, which static steps read; None where there is none.
        field: The engine's `rolled`, counted and in as many rows at a time as fit.
        rows: How many rows a static step takes at most.
        spent: Counts the evaluations of static steps.

    Returns:
        The student as a field, which may bring a rollout of its own.
    """
    field, on_card = as_student(config, parts, field), parts.device.type not in ON_HOST
    wanted = config.training.cuda_graphs
    if wanted == "auto":  # a graph would read blocks that have left again
        wanted = on_card and config.training.swap_blocks is None
    if not wanted or network is None:
        return field
    ask, both = in_precision(config, parts.device, network), None
    if guidance_scales(config) is not None:
        both = always_guided(ask, parts.empty_prompt, parts.combine)
    networks = list(dict.fromkeys([network, getattr(network, "transformer", network)]))
    return StaticField(field, ask, both, networks, capture=on_card, spent=spent, rows=rows)


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
    samples, one = parts.samples, in_precision(config, parts.device, rolled)
    group = max(samples.groups, key=lambda g: sum(map(math.prod, (g.shape, *g.source_shapes))))
    latents, sigma = torch.zeros(1, *group.shape, device=parts.device), torch.ones(1, device=parts.device)

    def ask_one():  # belongs to no update, and so is not counted
        for rows in group.data:
            if len(rows):
                one(latents, sigma, samples.condition(rows, [0], [False]).to(parts.device))

    # Gradients and the optimizer's two states come with the first update.
    reserved = 12 * sum(p.numel() for p in parts.student.parameters() if p.requires_grad)
    most = -(-config.training.batch_size // ranks.size)  # the same on all ranks: they ask together
    return choose_rows(config.training.rollout_batch_size, most, ask_one, parts.device, reserved)
