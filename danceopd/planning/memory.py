"""What a dry run finds, and how the memory of one rank adds up."""

import math
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
from danceopd.training.rollouts.replica import bytes_beside, make_replica, rollout_precision

FLOAT = 4  # bytes of a trainable parameter, its gradient, its average, and of one state of AdamW

LEFT = 2 * GIB  # of a card: context, workspace, fragmentation

BUS = (25e9, 50e9)  # bytes a second from host memory that times are given for

BASE, REPLICA = "base weights", "replica for rollouts"
ACTIVATIONS, BEYOND = "activations for the backward", "forwards without gradient, more"


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
        pixels: Of the largest picture of the prepared rows.
        activations: Bytes that the backward keeps, without and with gradient checkpointing (None where a network
            cannot); None where they are not known.
        forward: Bytes of one row of a forward without gradient, and how many rows it takes; None where not known.
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
    pixels: int | None = None
    activations: tuple[float, float | None] | None = None
    forward: tuple[float, int] | None = None
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
            if self.swap:
                lines.append(f"  {self.swap.line()}")
            lines.append("  (not counted: the CUDA context, kernels' workspace and fragmentation; leave 2 GiB)")
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
    findings.memory["average (EMA)"] = FLOAT * n, "as many as the student's"
    if precision := rollout_precision(config):
        replica = make_replica(student, torch.device("meta"), config)
        findings.memory[REPLICA] = bytes_beside(replica, student), f"of the student, in {precision}"
    if "anchor" in needs(config.method):
        findings.memory["anchor"] = FLOAT * n, "the student as it was, for this method"


def beyond_activations(findings: Findings, activations: float) -> float:
    """Returns what a forward without gradient takes more than the activations, which are not there at the same time."""
    return max(0.0, math.prod(findings.forward) - activations) if findings.forward else 0.0


def add_activations(
    config: Config, findings: Findings, plain: float, checkpointed: float | None, forward: float
) -> None:
    """Adds what forwards take.

    Args:
        config: the run's configuration.
        findings: what to add to.
        plain: bytes that the backward of one sample keeps.
        checkpointed: the same with gradient checkpointing; None where there is none.
        forward: Bytes of one row of a forward without gradient.
    """
    training, k = config.training, config.query.k
    guided = any(c.student_guidance_scale != 1 for c in config.capabilities.values())
    rows = micro_batch(config) * k * (2 if guided else 1)
    findings.activations = plain * rows, None if checkpointed is None else checkpointed * rows
    size, other = findings.activations
    text = "" if other is None else f"; {format_bytes(other)} with gradient checkpointing"
    if training.gradient_checkpointing:
        size, text = other, f", gradient checkpointing; {format_bytes(size)} without it"
    findings.memory[ACTIVATIONS] = size, f"{rows} samples in a forward{text}"
    wanted = training.rollout_batch_size
    at_once = training.batch_size if wanted == "auto" else min(wanted, training.batch_size)
    findings.forward = forward, at_once
    how = f"{at_once} rows x {format_bytes(forward)} of rollouts and queries; fewer where they do not fit"
    findings.memory[BEYOND] = beyond_activations(findings, size), how


def add_questions(config: Config, findings: Findings, latents: int) -> None:
    """Adds the states and answers of the whole batch; latents: bytes of one sample's latents in float32."""
    samples, k, levels = config.training.batch_size, config.query.k, torch.linspace(0, 1, 101)
    each = max(int(evaluations(config, c.source, levels).max()) for c in config.capabilities.values())
    size = samples * latents * (k + k * each + 3)
    how = f"{samples} samples x ({k} asked, {k * each} answered + state, velocity, step) in float32"
    findings.memory["states and answers"] = size, how
