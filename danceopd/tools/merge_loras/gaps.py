"""How much of the gap between the base and each source a student has closed, cheaply, at states that stay the same."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch

from danceopd.config.sections import Config
from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field, within
from danceopd.core.rollout import rollout
from danceopd.models.students import LoraStudent
from danceopd.tools.model_report import held_out
from danceopd.training.asking import as_student
from danceopd.training.assembly.parts import Parts, Scored
from danceopd.training.checkpoints import Checkpoint
from danceopd.training.resume import scores_of
from danceopd.training.rows import Rows, in_parts

GROWTH = 0.005  # of the mean share, that counts as growth

LEAST = -1.0  # a share counts as no less in a mean, so that one column that is far off does not rule all others


@dataclass(frozen=True)
class Probe:
    """One route's states, and what is wanted there.

    Attributes:
        states: [n, ...], along trajectories of the route's source.
        sigma: [n].
        conditioning: Of the n states.
        wanted: [n, ...], the source's velocities.
        whole: The mean squared error that is a gap of one.
    """

    states: torch.Tensor
    sigma: torch.Tensor
    conditioning: Conditioning
    wanted: torch.Tensor
    whole: float


class Gaps:
    """Measures the share of each route's gap that a field has closed: 1 - E(field) / E(base).

    E is the mean squared difference from the velocities of the route's source, along trajectories of that source. Of
    prompts that keep the base, the gap is what the LoRAs change there, and a field that is the base has closed it.

    Args:
        config: The run's.
        parts: Its parts.
        samples: Of each route, at most those of model_report.
    """

    def __init__(self, config: Config, parts: Parts, samples: int):
        self.config, self.parts, self.weights = config, parts, weights_of(config)
        self.rows = Rows(max(1, config.training.batch_size // config.training.gradient_accumulation_steps))
        self.sources = [within(field, lambda network: in_parts(network, self.rows)) for field in parts.fields]
        base, names = self.field(base_of(parts.student)), list(config.capabilities)
        self.probes: dict[str, Probe] = {}
        for m, name in enumerate(names):
            probe = self._probe(m, held_out(config, parts, m)[:samples])
            whole = self._error(base, probe)
            if whole <= 1e-9 * float(probe.wanted.float().square().mean()):  # it is the base
                others = [source for i, source in enumerate(self.sources) if i != m] or [base]
                whole = sum(self._error(source, probe) for source in others) / len(others)
            self.probes[name] = Probe(probe.states, probe.sigma, probe.conditioning, probe.wanted, max(whole, 1e-30))

    def field(self, network: Field) -> Field:
        """Makes a network the field that is compared: in the training's precision, guided, in parts that fit."""
        return as_student(self.config, self.parts, in_parts(network, self.rows))

    def __call__(self, network: Field) -> dict[str, float]:
        """Measures a network.

        Args:
            network: The student's, or another in its place.

        Returns:
            The share by route; 1 is the source itself, 0 the base, and less is worse than the base.
        """
        field = self.field(network)
        return {name: 1 - self._error(field, probe) / probe.whole for name, probe in self.probes.items()}

    @torch.no_grad()
    def _probe(self, m: int, batch: Batch) -> Probe:
        source, steps = self.sources[m], len(batch.sigmas) - 1
        every = torch.arange(steps).expand(len(batch.noise), -1)
        states, sigma = rollout(source, batch.noise, batch.conditioning, batch.sigmas, every)
        conditioning = batch.conditioning[torch.arange(len(batch.noise)).repeat_interleave(steps)]
        states, sigma = states.flatten(0, 1), sigma.flatten()
        return Probe(states, sigma, conditioning, source(states, sigma, conditioning), 1.0)

    @torch.no_grad()
    def _error(self, field: Field, probe: Probe) -> float:
        answer = field(probe.states, probe.sigma, probe.conditioning)
        return float((answer.float() - probe.wanted.float()).square().mean())


def base_of(student: LoraStudent) -> LoraStudent:
    """Copies a student's adapter, of which nothing is left but the base."""
    base = deepcopy(student)
    empty(base)
    return base


@torch.no_grad()
def empty(student: LoraStudent) -> None:
    """Makes an adapter add nothing."""
    for name in student.lora():
        student.factors_of(name)[1].zero_()


def weights_of(config: Config) -> dict[str, float]:
    """Returns the routes' shares of the samples, to scale."""
    return {name: capability.weight for name, capability in config.capabilities.items()}


def mean_share(shares: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Returns the mean of the routes' shares, in which each counts as it is sampled, and none as less than LEAST."""
    total = sum(weights[name] for name in shares)
    return sum(weights[name] * (LEAST if share < LEAST else share) for name, share in shares.items()) / total


def settled(scores: Sequence[Scored], patience: int, config: Config) -> bool:
    """Tells whether the mean share has not grown by more than GROWTH in the last `patience` scorings.

    While the learning rate rises little grows, and where more steps were asked for since then it is to go on: neither
    counts.

    Args:
        scores: All of a run.
        patience: Scorings that count; 0 for never.
        config: The run's.

    Returns:
        Whether the run may end.
    """
    if not 0 < patience < len(scores):
        return False
    training, weights = config.training, weights_of(config)
    means = [mean_share(shares, weights) for _, _, shares in scores]
    count = all(step >= training.warmup_steps and of == training.max_steps for step, of, _ in scores[-patience:])
    return count and max(means[-patience:]) <= max(means[:-patience]) + GROWTH


def ended_early(checkpoint: Checkpoint, patience: int, config: Config) -> bool:
    """Tells whether a checkpoint is of a run that has ended before all of its steps, since it has settled."""
    return checkpoint.step < config.training.max_steps and settled(scores_of(checkpoint.rest), patience, config)


def words(shares: dict[str, float]) -> str:
    """Writes shares as text: "ink 63 %, oil 58 %"."""
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
