"""Counts the network evaluations of a merge: of its updates that are left, its scorings and its comparison."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from danceopd.config.expressions import evaluations
from danceopd.config.sections import Config
from danceopd.models.lora_merges import COMBINATIONS, WEIGHTS
from danceopd.planning.counts import evaluations_per_step
from danceopd.tools.merge_loras.gaps import ended_early
from danceopd.training.checkpoints import load_newest

SCORINGS = 20  # in a run of all its steps

PROBES = 2  # samples of each route that a scoring asks

SAMPLES = 4  # that errors are measured on, of a LoRA's route and of prompts as they are

OF_PAIRS = 16  # of all routes together, by which a pair of many gets fewer

SHOWN = 2  # of a route in the page

OTHERS = 4  # that are compared beside the LoRAs: base, average, PEFT's best merge, result


@dataclass(frozen=True)
class Counts:
    """What a run has before it.

    Attributes:
        updates: That are left.
        scorings: That are left.
        each: Network evaluations of an update; None for a method of which they are not worked out.
        scoring: Of a scoring.
        comparison: Of the comparison at the end, with the search for PEFT's best merge.
        gaps: Of what scorings compare with, once.
    """

    updates: int
    scorings: int
    each: float | None
    scoring: float
    comparison: float
    gaps: float

    def total(self) -> float | None:
        """Returns all of them."""
        if self.each is None:
            return None
        return self.updates * self.each + self.scorings * self.scoring + self.comparison + self.gaps


def score_every(config: Config) -> int:
    """Returns the updates between two scorings."""
    return max(1, config.training.max_steps // SCORINGS)


def samples_of(config: Config) -> dict[str, int]:
    """Returns how many samples of each route the comparison measures."""
    few = max(1, min(SAMPLES, OF_PAIRS // len(config.capabilities)))
    return {name: few if " + " in name else SAMPLES for name in config.capabilities}


def counted(config: Config, sigmas: torch.Tensor, patience: int, overwrite: bool) -> Counts:
    """Counts what a run has before it, from its newest checkpoint on.

    Args:
        config: The run's.
        sigmas: The model's noise levels.
        patience: Scorings without growth after which it ends.
        overwrite: Whether it is started again.

    Returns:
        The counts.
    """
    checkpoint = None if overwrite else load_newest(config.training.output_dir / "checkpoints")[0]
    done, steps, every = checkpoint.step if checkpoint else 0, config.training.max_steps, score_every(config)
    if checkpoint and ended_early(checkpoint, patience, config):
        done = steps
    left = max(0, steps - done)
    scorings = 0 if not left else steps // every - done // every + (done == 0)
    each = evaluations_per_step(config, sigmas)
    loras = [name for name, source in config.sources.items() if source.lora]
    once, stages = dict.fromkeys(config.capabilities, 1), 2 if config.rollout.solver == "heun" else 1
    rolled = stages * (1 - 1 / len(sigmas[:-1]))  # to the last noise level that is asked
    own, asked = _of_forward(config, sigmas)

    def gaps(samples: Mapping[str, int]) -> float:
        # Where a route is the base's, what the LoRAs change is the others' difference from it.
        base = [name for name in samples if not any(lora in loras for lora in name.split(" + "))]
        others = sum(samples[name] * asked[other] for name in base for other in asked if other != name)
        return others + sum(n * ((rolled + 1) * asked[name] + own[name]) for name, n in samples.items())

    compared = gaps(once) + len(COMBINATIONS) * len(WEIGHTS) * sum(own.values())
    for name, n in samples_of(config).items():
        compared += (len(loras) + OTHERS) * n * ((rolled + 1) * own[name] + asked[name])
        compared += stages * min(n, SHOWN) * (3 * own[name] + asked[name])
    return Counts(
        left,
        scorings,
        sum(each.values()) if each else None,
        PROBES * sum(own.values()),
        compared,
        gaps(dict.fromkeys(once, PROBES)),
    )


def _of_forward(config: Config, sigmas: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Counts by route what one sample takes at all noise levels, of a student with its guidance and of the source."""
    own = {name: len(sigmas[:-1]) * (1 + (c.student_guidance_scale != 1)) for name, c in config.capabilities.items()}
    asked = {
        name: float(evaluations(config, capability.source, sigmas[:-1]).sum())
        for name, capability in config.capabilities.items()
    }
    return own, asked
