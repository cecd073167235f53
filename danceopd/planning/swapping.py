"""How many blocks of a shared base wait in host memory, what that spares the card, and what it sends over the bus."""

import math

from danceopd.config.sections import Config
from danceopd.models.swapping import ALIVE, swapped_of
from danceopd.planning.memory import BASE, LEFT, Findings, Swapped
from danceopd.support.errors import UserError

IN_HOST = "blocks of the base"


def settle(config: Config, findings: Findings, memory: float | None) -> None:
    """Chooses how many blocks wait where the configuration says ``auto``, and counts what then lies where.

    Args:
        config: The run's.
        findings: The dry run's, whose base weights and host memory are changed; again for another card.
        memory: Bytes of the card that a process can have; None where no card is known, and all blocks wait.
    """
    wanted = config.training.swap_blocks
    if wanted is None or not findings.blocks:
        return
    there, whole = len(findings.blocks), findings.memory[BASE]
    if findings.swap:  # of another card
        whole = whole[0] + findings.swap.spared, findings.swap.how
    findings.memory[BASE], findings.swap = whole, None
    if wanted == "auto":
        fits = [0, *range(ALIVE + 1, there + 1)]
        total = findings.total_memory() + LEFT
        if memory is not None:
            fits = [n for n in fits if total - spared(findings, n) <= memory] or fits[-1:]
        count = fits[0] if memory is not None else fits[-1]
    else:
        count = wanted
    if not count:
        findings.host.pop(IN_HOST, None)
        return
    try:
        chosen = swapped_of(there, count, "the transformer")
    except UserError as error:
        findings.problems.append(f"training.swap_blocks: {error}")
        return
    size = sum(findings.blocks[i] for i in chosen)
    findings.swap = Swapped(count, size, spared(findings, count), passes(config, findings), whole[1])
    findings.memory[BASE] = whole[0] - findings.swap.spared, f"{whole[1]}; {count} of {there} blocks wait"
    findings.host[IN_HOST] = size, f"{count} of {there}, pinned; {ALIVE} of them on the card at a time"


def spared(findings: Findings, count: int) -> float:
    """Counts the bytes of the card that so many waiting blocks spare.

    Args:
        findings: The dry run's.
        count: How many wait.

    Returns:
        The bytes.
    """
    if not count:
        return 0.0
    sizes = sorted(findings.blocks[i] for i in swapped_of(len(findings.blocks), count, "the transformer"))
    return sum(sizes[:-ALIVE])


def passes(config: Config, findings: Findings) -> int:
    """Counts how often an update brings each waiting block to the card, at most.

    A rollout of the whole batch, to the deepest state, the sources and each micro-batch's forward bring it once, and so
    does a backward, which computes the block again.
    """
    rollout, rows = config.rollout, findings.forward[1] if findings.forward else config.training.batch_size
    at_a_time = math.ceil(config.training.batch_size / rows)
    steps = rollout.num_inference_steps * (2 if rollout.solver == "heun" else 1)
    on_base = any(source.weights in (None, "base") for source in config.networks().values())
    asked = steps + on_base
    return at_a_time * asked + 2 * config.training.gradient_accumulation_steps
