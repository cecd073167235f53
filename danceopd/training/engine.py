"""What holds the student and its optimizer in one process."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from danceopd.config.sections import Config
from danceopd.support.optimizers import make_optimizers, set_learning_rate
from danceopd.training.checkpoints import Checkpoint
from danceopd.training.rollouts.replica import destinations, make_replica, rollout_precision


def kept_share(decay: float, updates: int) -> float:
    """Works out the share of the running mean that an update keeps: min(decay, (1 + n) / (10 + n)) after n of them.

    As diffusers' EMAModel has it: a mean that kept `decay` from the start would still be mostly the first weights when
    a short run ends.

    Args:
        decay: The most that it keeps.
        updates: The number of updates that the mean has taken in; nothing is kept of what was before the first.
    """
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0


class Average:
    """Keeps the running mean of a network's parameters, by numbers of the host alone.

    torch's AveragedModel counts in a tensor, whose copy to the device the host waits for at every update.

    Args:
        network: The network; the mean begins as its first update leaves it.
        decay: The most of the mean that an update keeps, as `kept_share` has it.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.module, self.decay, self.updates = copy.deepcopy(network).eval(), decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Takes in the network as it is now.

        Args:
            network: The network.
        """
        own, new = list(self.module.parameters()), list(network.parameters())
        if self.updates:
            torch._foreach_lerp_(own, new, 1 - kept_share(self.decay, self.updates))
        else:
            torch._foreach_copy_(own, new)
        for mean, value in zip(self.module.buffers(), network.buffers(), strict=True):
            mean.copy_(value)
        self.updates += 1


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
        self.ema = Average(student, training.ema_decay)
        self.optimizers = make_optimizers(student, training.optimizer, training.learning_rate, training.weight_decay)

    def finish(self) -> None:
        """Does nothing: no other rank asks without gradient."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one of an update's micro-batches.

        Args:
            loss: A scalar tensor with gradient, the micro-batch's share of the mean over the batch.
        """
        loss.backward()

    def step(self, rate: float, seen: torch.Tensor | None = None) -> tuple[float, bool, torch.Tensor | None]:
        """Makes one optimizer step, but none where the gradient's norm is not finite, and forgets the gradient.

        The host waits for the device once, to read the norm.

        Args:
            rate: The learning rate.
            seen: A float32 tensor that is read with it.

        Returns:
            The norm of the gradient before it is clipped, whether the student was updated, and what was seen, on the
            CPU.
        """
        for p in self.student.parameters():
            if p.grad is None:  # what no sample of this batch passes through; DeepSpeed takes it so too
                p.grad = torch.zeros_like(p)
        total = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.max_grad_norm)
        if seen is None:
            norm = float(total)
        else:
            read = torch.cat([total.view(1), seen.flatten()]).cpu()
            norm, seen = float(read[0]), read[1:].view(seen.shape)
        finite = math.isfinite(norm)
        if finite:
            for optimizer in self.optimizers:
                set_learning_rate(optimizer, rate)
                optimizer.step()
            self.ema.update(self.student)
            self._refresh()
        self.student.zero_grad(set_to_none=True)
        return norm, finite, seen

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
        return {"averaged": self.ema.updates, "optimizer": others}

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
        self.ema.updates = rest["averaged"]
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
    tensor = isinstance(value, torch.Tensor) and not hasattr(value, "codes")  # as torchao's of eight bits have
    return tensor and value.shape == p.shape and value.is_floating_point()
