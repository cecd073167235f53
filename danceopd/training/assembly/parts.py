"""What a run is made of."""

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


@dataclass
class Parts:
    """The student, each route's frozen field in the order of `config.capabilities`, where batches come from.

    anchor: the student as it was before training, frozen, where the method asks for it; save: writes a checkpoint's
    averaged student into a folder, as others load it; combine: the model's own guidance, for `guided`. Of a model also
    drawing_sigmas: noise levels of a finished picture by the latents' shape; load_decoder: loads what decodes latents.
    lockstep: of the sources that ranks share. score: scores a network for the curves, where a run's pictures can be.
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
    score: Callable[[Field], dict] | None = None


def _average(shell: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The averaged student of a checkpoint, in float32 on the CPU."""
    return twin(shell, lambda name, p: checkpoint.tensor(f"ema/{name}"))


def _stop_at(problems: list[str], ranks: Ranks = ALONE) -> None:
    """Raise what is wrong; of several `ranks`, on all of them what is wrong on one."""
    for rank, found in sorted(enumerate(ranks.gather(problems)), key=lambda item: item[0] != ranks.rank):
        if found:
            where = "" if rank == ranks.rank else f" on rank {rank}"
            raise UserError("\n  ".join([f"this run cannot start{where}:", *found]))
