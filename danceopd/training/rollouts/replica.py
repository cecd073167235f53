"""A frozen copy of the student that rollouts ask, filled after each update, in its own precision, bfloat16 or FP8."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from danceopd.config.sections import Config
from danceopd.models.fp8 import Fp8Linear, to_fp8
from danceopd.models.twins import twin


class Destination(NamedTuple):
    """Tells where a parameter's value goes.

    Attributes:
        dtype: The dtype that the value comes in.
        write: ``write(value)`` puts it there.
    """

    dtype: torch.dtype
    write: Callable[[torch.Tensor], object]


def rollout_precision(config: Config) -> str | None:
    """Tells what training.rollout_precision asks beyond the student itself.

    Args:
        config: The run's.

    Returns:
        ``bf16`` or ``fp8``; None for the student's own precision, and for that of the base under an adapter.
    """
    wanted, training = config.training.rollout_precision, config.training
    if config.student.lora and wanted in (training.precision, training.base_precision):
        return None
    return wanted


def multiplies_in_bf16(config: Config) -> bool:
    """Tells whether autocast is on around the student; an adapter runs as its base does.

    Args:
        config: The run's.

    Returns:
        Whether it is.
    """
    return config.training.precision == "bf16" and not config.student.lora


def make_replica(student: nn.Module, device: torch.device, config: Config) -> nn.Module:
    """Makes a copy of the student to be filled through `destinations`, whose addresses stay.

    In the student's own precision the weights that autocast casts to bfloat16 are stored so. Of rollout_precision, bf16
    stores the same ones and makes the products in it too; fp8 stores the linear layers in the blocks so, from what the
    student multiplies with, and leaves the rest to bf16. An adapter keeps its float32, on a copy of its base in FP8.

    Args:
        student: Whose values are not read, but those of the frozen base under an adapter.
        device: Where the copy lies.
        config: The run's.

    Returns:
        The replica, in eval mode.
    """
    precision = rollout_precision(config)
    narrow = multiplied(student) if multiplies_in_bf16(config) or precision == "bf16" else set()

    def shape_of(name: str, p: torch.Tensor) -> torch.Tensor:
        return torch.empty(p.shape, dtype=torch.bfloat16 if name in narrow else torch.float32, device="meta")

    copied = twin(student, shape_of).eval()
    if precision == "fp8":
        copied.on_fp8() if hasattr(copied, "on_fp8") else to_fp8(getattr(copied, "transformer", copied))
    copied._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    if precision == "bf16" and device.type != "meta":
        copied.forward = torch.autocast(device.type, torch.bfloat16)(copied.forward)
    return copied


def destinations(network: nn.Module) -> dict[str, Destination]:
    """Finds where the value of each parameter goes.

    Args:
        network: A replica, or a student.

    Returns:
        The destinations by the parameters' names.
    """
    found = {name: Destination(p.dtype, p.copy_) for name, p in network.named_parameters()}
    for name, module in network.named_modules():
        if isinstance(module, Fp8Linear):
            found[f"{name}.weight"] = Destination(module.dtype, module.fill)
    return found


def multiplied(module: nn.Module) -> set[str]:
    """Finds the parameters that autocast casts to bfloat16.

    Args:
        module: The network.

    Returns:
        Their names.
    """
    return {
        f"{name}.{own}"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
        for own, _ in part.named_parameters(recurse=False)
    }


def bytes_beside(replica: nn.Module, student: nn.Module) -> int:
    """Adds up what a replica holds that the student does not hold too.

    Args:
        replica: The replica.
        student: The student.

    Returns:
        Bytes.
    """
    own, other = _tensors(replica), _tensors(student)
    return sum(tensor.nbytes for key, tensor in own.items() if key not in other)


def _tensors(network: nn.Module) -> dict[int, torch.Tensor]:
    """Finds a network's parameters and buffers, and those of the transformer under an adapter."""
    parts = (network, getattr(network, "transformer", network))  # the latter is no module of an adapter
    return {id(t): t for part in parts for t in (*part.parameters(), *part.buffers())}
