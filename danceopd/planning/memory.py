"""What a dry run finds, and how the memory of one rank adds up."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from danceopd.config.expressions import evaluations
from danceopd.config.sections import Config
from danceopd.core.methods import needs
from danceopd.models.eight_bit import stored
from danceopd.support.memory import GIB, format_bytes
from danceopd.support.optimizers import Muon, make_optimizers
from danceopd.support.texts import many
from danceopd.training.rollouts.replica import bytes_beside, make_replica, rollout_precision

FLOAT = 4  # bytes of a trainable parameter, its gradient, its average, and of one state of AdamW

# What a card takes beside what is counted, and a CPU does not; set aside, not measured.
RESERVES = {"CUDA context": 0.5 * GIB, "workspaces of libraries": 0.5 * GIB, "fragmentation": GIB}
LEFT = sum(RESERVES.values())

BUS = (25e9, 50e9)  # bytes a second from host memory that times are given for

BASE, REPLICA = "base weights", "replica for rollouts"
ACTIVATIONS, BEYOND = "forward and backward", "forwards without gradient, more"
STEP = "optimizer's step, more"


@dataclass(frozen=True)
class Swapped:
    """What waits in host memory of a shared base.

    Attributes:
        count: Number of blocks.
        size: Their bytes.
        spared: Bytes that the card need not hold.
        passes: How often an update brings each of them to the card, at most.
        how: How the bytes of the whole base come about.
    """

    count: int
    size: float
    spared: float
    passes: int
    how: str

    def line(self) -> str:
        """Says what an update sends over the bus, and how long that takes."""
        sent = self.size * self.passes
        times = " or ".join(f"{sent / speed:.3g} s at {speed / 1e9:.0f} GB/s" for speed in BUS)
        return (
            f"{self.count} blocks come from host memory at most {self.passes} times an update: {format_bytes(sent)} "
            f"over the bus, {times}, while blocks compute"
        )


@dataclass
class Findings:
    """What a dry run found, as far as the files allow.

    Attributes:
        problems: What keeps the run from starting, each as "key: message".
        warnings: What lets it start, and should be mended, in the same way.
        found: Lines about files.
        parameters: Number of parameters by network.
        memory: Bytes of one rank by term, and how they come about.
        host: Bytes that wait in host memory, in the same way.
        blocks: Bytes of each block of a base of which some wait in host memory; empty where none does.
        swap: Those that do, as `planning.swapping.settle` chose them.
        precision: A line on what ``training.base_precision: auto`` is, and why; None where the configuration says it.
        full_rank: The rank at which the student's adapter changes every layer in full; None without one.
        pixels: Of the largest picture of the prepared rows.
        activations: The most bytes of a micro-batch's forward and backward beside the gradient, without and with
            gradient checkpointing (None where a network cannot); None where they are not known.
        forward: Bytes of one row of a forward without gradient, and how many rows it takes; None where not known.
        together: What `activations` says, with the gradient that comes while they go; None where the gradient is
            counted as if all of it were there before.
        step: Bytes that the optimizer's step makes and forgets, on a card.
        evaluations: Network evaluations of one update by what they are for; None for a method where they are not
            worked out.
        grid: Network evaluations of a sample grid, and once in a run of its sources' rows.
        sigmas: float32 tensor [N + 1], a model's noise levels; None where they are the configuration's, or not known.
        operations: Works out the floating-point operations of a forward of one sample, by capability.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, tuple[float, str]] = field(default_factory=dict)
    host: dict[str, tuple[float, str]] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    swap: Swapped | None = None
    precision: str | None = None
    full_rank: int | None = None
    pixels: int | None = None
    activations: tuple[float, float | None] | None = None
    forward: tuple[float, int] | None = None
    together: tuple[float, float | None] | None = None
    step: float = 0.0
    evaluations: dict[str, float] | None = None
    grid: tuple[int, int] | None = None
    sigmas: torch.Tensor | None = None
    operations: Callable[[], dict[str, int]] | None = None

    def attempt(self, key: str, function: Callable, *args):
        """Returns function(*args), or None after noting under the key what a user can mend."""
        try:
            return function(*args)
        except (ValueError, OSError) as error:
            self.problems.append(f"{key}: {error}")

    def total_memory(self) -> float:
        """Returns the bytes of one rank, as far as they are known."""
        return sum(size for size, _ in self.memory.values())

    def text(self) -> str:
        """Returns the whole as it is printed."""
        lines = list(self.found)
        if self.parameters:
            lines += ["", "parameters"]
            lines += [f"  {name:34s} {count:>18,d}" for name, count in self.parameters.items()]
        if self.memory:
            lines += ["", "memory of one rank, an estimate (each rank holds all of it)"]
            lines += [f"  {name:34s} {format_bytes(size):>12s}   {how}" for name, (size, how) in self.memory.items()]
            unknown = (
                ""
                if self.activations
                else "   at least: without activations, which need prepared rows and the transformer"
            )
            lines.append(f"  {'total':34s} {format_bytes(self.total_memory()):>12s}{unknown}")
            for name, (size, how) in self.host.items():
                lines.append(f"  {name + ', in host memory':34s} {format_bytes(size):>12s}   {how}")
            if self.precision:
                lines.append(f"  {self.precision}")
            if self.swap:
                lines.append(f"  {self.swap.line()}")
            lines.append(f"  (beside it a card takes {reserves()})")
        lines += ["", "network evaluations of one update, expected (forwards of one sample; a backward is two)"]
        if self.evaluations is None:
            lines.append("  not worked out for this method")
        else:
            lines += [f"  {name:34s} {count:10.1f}" for name, count in self.evaluations.items()]
            lines.append(f"  {'total':34s} {sum(self.evaluations.values()):10.1f}")
        if self.grid:
            lines.append(f"  a sample grid: {self.grid[0]}, and {self.grid[1]} of its sources for the first")
        if self.warnings:
            lines += ["", *(f"warning: {warning}" for warning in self.warnings)]
        if self.problems:
            lines += ["", "this run cannot start:", *(f"  {problem}" for problem in self.problems)]
        return "\n".join(lines).lstrip("\n")


def reserves() -> str:
    """Says what is left of a card for what is not counted."""
    return (
        ", ".join(f"{format_bytes(size)} for {name}" for name, size in RESERVES.items()) + ": set aside, not measured"
    )


def count(network: nn.Module) -> int:
    """Returns the number of a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def nbytes(network: nn.Module) -> int:
    """Returns the bytes of a network's parameters and buffers."""
    return sum(part.nbytes for tensor in (*network.parameters(), *network.buffers()) for part in stored(tensor))


def micro_batch(config: Config) -> int:
    """Returns the number of samples in a micro-batch of one process."""
    return config.training.batch_size // config.training.gradient_accumulation_steps


def add_student(config: Config, findings: Findings, student: nn.Module) -> None:
    """Adds the student's parameters and what training keeps of each, in float32 unless the term says otherwise."""
    n, optimizer = count(student), config.training.optimizer
    findings.parameters["student, trainable"] = n
    findings.memory["student"] = FLOAT * n, f"{n:,} trainable x 4 bytes, float32"
    findings.memory["gradient"] = FLOAT * n, "as many"
    if optimizer == "adamw_8bit":
        findings.memory["optimizer state"] = 2 * n, "AdamW: 2 of 1 byte each"
    else:
        made = make_optimizers(student, optimizer, config.training.learning_rate, config.training.weight_decay)
        groups = [(o, sum(p.numel() for group in o.param_groups for p in group["params"])) for o in made]
        state = FLOAT * sum(number * (1 if isinstance(o, Muon) else 2) for o, number in groups)
        findings.memory["optimizer state"] = state, f"{optimizer}: {state / n:.2g} bytes a parameter"
        findings.step = max(map(_step_bytes, made))
    findings.memory["average (EMA)"] = FLOAT * n, "as many as the student's"
    if buffers := sum(buffer.nbytes for buffer in student.buffers()):
        findings.memory["student's buffers"] = 2 * buffers, "its tables, such as of positions, and the average's"
    if precision := rollout_precision(config):
        replica = make_replica(student, torch.device("meta"), config)
        findings.memory[REPLICA] = bytes_beside(replica, student), f"of the student, in {precision}"
    if "anchor" in needs(config.method):
        findings.memory["anchor"] = FLOAT * n, "the student as it was, for this method"


def _step_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Counts what a step makes and forgets on a card, where AdamW takes all parameters at once."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = Counter()
    for p in parameters if isinstance(optimizer, Muon) else ():
        sizes[p.shape] += p.numel()
    # Muon's updates, and of those of one shape the stack, what it becomes, and two products on the way.
    return FLOAT * (sum(p.numel() for p in parameters) + 4 * max(sizes.values(), default=0))


def rows_matched(config: Config) -> int:
    """Returns the number of rows of a micro-batch's forward with gradient."""
    guided = any(c.student_guidance_scale != 1 for c in config.capabilities.values())
    return micro_batch(config) * config.query.k * (2 if guided else 1)


def rows_at_once(config: Config) -> int:
    """Returns the number of rows of a forward without gradient."""
    wanted, samples = config.training.rollout_batch_size, config.training.batch_size
    return samples if wanted == "auto" else min(wanted, samples)


def beyond_activations(findings: Findings, activations: float) -> float:
    """Returns what a forward without gradient takes more than one with it, which is not there at the same time."""
    return max(0.0, math.prod(findings.forward) - activations) if findings.forward else 0.0


def alone(findings: Findings, checkpointing: bool) -> dict[str, float]:
    """Returns the terms of an update in one process of which not all are there at the same time.

    These are forwards without gradient; a micro-batch's forward and backward, with its gradient; and the gradient and
    the step of the optimizer.

    Args:
        findings: The dry run's.
        checkpointing: Whether the backward computes blocks again.
    """
    activations, gradient = findings.activations[checkpointing], FLOAT * findings.parameters["student, trainable"]
    made = gradient
    if findings.together:
        made = min(gradient, max(0.0, findings.together[checkpointing] - activations))
    beyond = beyond_activations(findings, activations + made)
    step = max(0.0, gradient + findings.step - made - activations - beyond)
    return {"gradient": made, ACTIVATIONS: activations, BEYOND: beyond, STEP: step}


def add_activations(
    config: Config,
    findings: Findings,
    plain: float,
    checkpointed: float | None,
    forward: float,
    together: tuple[float, float | None] | None = None,
) -> None:
    """Adds what forwards, and the optimizer's step, take.

    Args:
        config: the run's configuration.
        findings: what to add to.
        plain: bytes that a micro-batch's forward and backward take beside the gradient.
        checkpointed: the same with gradient checkpointing; None where there is none.
        forward: Bytes of a forward without gradient of `rows_at_once`.
        together: As in the findings.
    """
    findings.activations, rows, at_once = (plain, checkpointed), rows_matched(config), rows_at_once(config)
    findings.forward, findings.together = (forward / at_once, at_once), together
    size, other = plain, checkpointed
    text = "" if other is None else f"; {format_bytes(other)} with gradient checkpointing"
    if config.training.gradient_checkpointing:
        size, text = other, f", gradient checkpointing; {format_bytes(size)} without it"
    terms = alone(findings, config.training.gradient_checkpointing)
    part = terms["gradient"] / (FLOAT * findings.parameters["student, trainable"])
    rows_each = f"{at_once} rows x {format_bytes(forward / at_once)}"
    how = {
        "gradient": "as many" if part == 1 else f"{part:.0%} of as many, the rest while what it was made from goes",
        ACTIVATIONS: f"{many(rows, 'sample')} with gradient{text}",
        BEYOND: f"{rows_each} of rollouts and queries; fewer where they do not fit",
        STEP: "where the gradient and what AdamW makes of it on a card are more than all these",
    }
    findings.memory |= {name: (size, how[name]) for name, size in terms.items()}


def add_questions(config: Config, findings: Findings, latents: int) -> None:
    """Adds the states and answers of the whole batch; latents: bytes of one sample's latents in float32."""
    samples, k, levels = config.training.batch_size, config.query.k, torch.linspace(0, 1, 101)
    each = max(int(evaluations(config, c.source, levels).max()) for c in config.capabilities.values())
    size = samples * latents * (k + k * each + 3)
    how = f"{many(samples, 'sample')} x ({k} asked, {k * each} answered + state, velocity, step) in float32"
    findings.memory["states and answers"] = size, how
