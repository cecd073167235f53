"""What holds the student and its optimizer in one process."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from danceopd.config.sections import Config
from danceopd.support.optimizers import make_optimizers, set_learning_rate
from danceopd.training.checkpoints import Checkpoint
from danceopd.training.rollouts.replica import destinations, make_replica, rollout_precision


class Local:
    """Holds a student in one process, its optimizers and its average.

    danceopd.training.zero.engine.Zero has the same for many processes. Both have: `student`, asked with gradient;
    `rolled`, the same weights, asked without; `resident`, the network that `rolled` asks, the student or a replica, or
    None where its forwards gather weights; `finish`, `backward` and `step`; `averaged`, the running mean of the student
    as a network to draw with; and `tensors`, `rest` and `load` for checkpoints.

    Args:
        student: The network that is trained.
        config: The run's.
    """

    def __init__(self, student: nn.Module, config: Config):
        training = config.training
        self.student, device = student.train(), next(student.parameters()).device
        self.replica = make_replica(student, device, config) if rollout_precision(config) else None
        self.rolled = self.resident = student if self.replica is None else self.replica
        self._refresh()
        self.shapes = {name: p.shape for name, p in student.named_parameters()}
        self.max_grad_norm = training.max_grad_norm
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(training.ema_decay)
        self.ema = torch.optim.swa_utils.AveragedModel(student, multi_avg_fn=decay).eval()
        self.optimizers = make_optimizers(student, training.optimizer, training.learning_rate, training.weight_decay)

    def finish(self) -> None:
        """Does nothing: no other rank asks without gradient."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one of an update's micro-batches.

        Args:
            loss: A scalar tensor with gradient, the micro-batch's share of the mean over the batch.
        """
        loss.backward()

    def step(self, rate: float) -> tuple[float, bool]:
        """Makes one optimizer step, but none where the gradient's norm is not finite, and forgets the gradient.

        Args:
            rate: The learning rate.

        Returns:
            The norm of the gradient before it is clipped, and whether the student was updated.
        """
        for p in self.student.parameters():
            if p.grad is None:  # what no sample of this batch passes through; DeepSpeed takes it so too
                p.grad = torch.zeros_like(p)
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.max_grad_norm))
        finite = math.isfinite(norm)
        if finite:
            for optimizer in self.optimizers:
                set_learning_rate(optimizer, rate)
                optimizer.step()
            self.ema.update_parameters(self.student)
            self._refresh()
        self.student.zero_grad(set_to_none=True)
        return norm, finite

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Gives the average as a network.

        Returns:
            The context of it.
        """
        yield self.ema.module

    def tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Size]]:
        """Collects the weights, the average and the optimizer's states, by the names of a checkpoint.

        Returns:
            The tensors, flat, and their shapes.
        """
        named = {f"student/{name}": p for name, p in self.student.named_parameters()}
        named |= {f"ema/{name}": p for name, p in self.ema.module.named_parameters()}
        for name, p, state in self._states():
            named |= {f"optimizer/{key}/{name}": value for key, value in state.items() if _like(value, p)}
        return {name: t.detach().flatten() for name, t in named.items()}, {name: t.shape for name, t in named.items()}

    def rest(self) -> dict:
        """Collects what is not of a parameter's shape: numbers of steps, and states of eight bits.

        Returns:
            What a checkpoint keeps beside the large tensors.
        """
        others = {
            name: {key: value for key, value in state.items() if not _like(value, p)}
            for name, p, state in self._states()
        }
        return {"averaged": int(self.ema.n_averaged), "optimizer": others}

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint, of however many ranks.

        Args:
            checkpoint: The checkpoint.
        """
        rest = checkpoint.rest["engine"]
        for kind, network in (("student", self.student), ("ema", self.ema.module)):
            for name, p in network.named_parameters():
                p.copy_(checkpoint.tensor(f"{kind}/{name}"))
        self.ema.n_averaged.fill_(rest["averaged"])
        states = checkpoint.optimizer_states()
        names = {p: name for name, p in self.student.named_parameters()}
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                # A number of steps stays on the host, where the optimizer keeps it.
                state = {
                    key: value.to(p.device) if isinstance(value, torch.Tensor) and value.dim() else value
                    for key, value in rest["optimizer"].get(names[p], {}).items()
                }
                state |= {key: checkpoint.tensor(full).to(p) for key, full in states.get(names[p], {}).items()}
                if state:
                    optimizer.state[p] = state
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Writes the student's weights into the replica."""
        found = {} if self.replica is None else destinations(self.replica)
        for name, destination in found.items():
            destination.write(self.student.get_parameter(name).to(destination.dtype))

    def _states(self) -> Iterator[tuple[str, nn.Parameter, dict]]:
        """Gives the name, the parameter and its optimizer's state of each parameter that has one."""
        names = {p: name for name, p in self.student.named_parameters()}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                yield names[p], p, state


def _like(value, p: torch.Tensor) -> bool:
    """Tells whether a state is a plain tensor as large as its parameter; a state of eight bits is not."""
    return type(value) is torch.Tensor and value.shape == p.shape and value.is_floating_point()
