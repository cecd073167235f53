"""The parts that a run is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from danceopd.core.conditioning import Tensors
from danceopd.core.fields import Field
from danceopd.data.sampler import Samples
from danceopd.models.twins import twin
from danceopd.support.errors import UserError
from danceopd.support.ranks import ALONE, Ranks
from danceopd.training.checkpoints import Checkpoint
from danceopd.training.zero.lockstep import Lockstep

Scored = tuple[int, int, dict[str, float]]  # the step, the run's max_steps by then, and the scores


@dataclass
class Parts:
    """Holds a run's networks and data, put together by `training.assembly.build.build_model` or `world.build.build`.

    Attributes:
        student: The network that is trained, on its device.
        fields: The frozen source of each route, in the order of `config.capabilities`.
        samples: Where batches are drawn from.
        anchor: The student as it was before training, frozen; None where the method asks for none.
        empty_prompt: The encoded empty prompt, which guidance asks with.
        device: Where the run computes.
        save: `save(checkpoint, folder)` writes the averaged student of a checkpoint as others load it.
        combine: The model's own rule of guidance, for `core.fields.guided`; None for the usual one.
        drawing_sigmas: Noise levels [N + 1] of a finished picture by the latents' shape; of a model alone.
        load_decoder: Loads the function that decodes latents to pictures; of a model alone.
        lockstep: Keeps ranks in step where they share the sources' shards.
        warnings: Lines to say before the first step.
        score: `score(field)` gives the scores that the log's curves show; None where a run has none.
        score_every: Updates between scores, beside those of evaluation.times; 0 for none.
        enough: Is given all scores so far, in their order, and tells whether the run may end before all of its steps;
            None where it never may.
    """

    student: nn.Module
    fields: list[Field]
    samples: Samples
    anchor: nn.Module | None
    empty_prompt: Tensors
    device: torch.device
    save: Callable[[Checkpoint, Path], None]
    combine: Callable | None = None
    drawing_sigmas: dict[tuple[int, ...], torch.Tensor] | None = None
    load_decoder: Callable[[], Callable] | None = None
    lockstep: Lockstep | None = None
    warnings: tuple[str, ...] = ()
    score: Callable[[Field], dict[str, float]] | None = None
    score_every: int = 0
    enough: Callable[[list[Scored]], bool] | None = None


class Problems(list[str]):
    """Collects what is wrong with a run, so that all of it is said at once: a list of "key: message"."""

    def attempt(self, key: str, function: Callable, *args):
        """Calls a function, and notes under a key what a user can mend.

        Args:
            key: The configuration's key that the function is about.
            function: Is called with args.

        Returns:
            What the function returns, or None where it raised ValueError or OSError.
        """
        try:
            return function(*args)
        except (ValueError, OSError) as error:
            self.append(f"{key}: {error}")

    def stop(self, ranks: Ranks = ALONE) -> None:
        """Stops the run if anything is wrong; with several ranks, on all of them if anything is on one.

        Args:
            ranks: The processes of the run.

        Raises:
            UserError: Lists what is wrong.
        """
        for rank, found in sorted(enumerate(ranks.gather(list(self))), key=lambda item: item[0] != ranks.rank):
            if found:
                where = "" if rank == ranks.rank else f" on rank {rank}"
                raise UserError("\n  ".join([f"this run cannot start{where}:", *found]))


def averaged_student(empty: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Makes the averaged student (EMA) of a checkpoint.

    Args:
        empty: The student without values.
        checkpoint: The checkpoint.

    Returns:
        The network, in float32 on the CPU.
    """
    return twin(empty, lambda name, p: checkpoint.tensor(f"ema/{name}"))
