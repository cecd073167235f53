"""Which implementation of an operation runs: the fastest that the device, the dtype and this machine offer."""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from danceopd_kernels import checks, compiled

VARIABLE = "DANCEOPD_KERNELS"
BACKENDS = ("torch", "cpu", "cuda", "triton")  # plain PyTorch; compiled for the host, for the device; Triton
ORDER = {"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")}  # the fastest first
GRID = 65535  # programs that a GPU takes along the second axis of a grid


def rows_of(width: int) -> tuple[int, int, int]:
    """Returns the rows of a program that has whole ones, their columns rounded up, and its warps.

    A program has about 4096 entries or one row, and a thread 16 or 32 of them.
    """
    block = max(32, 1 << (width - 1).bit_length())
    rows = min(8, max(1, 4096 // block))
    return rows, block, min(16, max(1, rows * block // 512))


@cache  # asked at every call; where Triton is missing, find_spec searches the whole path
def has_triton() -> bool:
    return find_spec("triton") is not None


def refusal(
    backend: str,
    offered: tuple[str, ...],
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    limit: Callable[[str], str | None] = lambda _: None,
) -> str | None:
    """Why a backend cannot take a tensor; None if it can. offered, dtypes, limit: what the operation's kernels take."""
    if backend == "torch":
        return None
    if backend not in offered:
        return "this operation has no such kernel"
    if tensor.dtype not in dtypes:
        return f"no kernel for {tensor.dtype}"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    device = "cpu" if backend == "cpu" else "cuda"
    if tensor.device.type != device and not interpreted:
        return f"the tensors are on {tensor.device}"
    if not checks.has_memory(tensor):
        return f"a {type(tensor).__name__} has no memory of its own"
    if checks.transforming():
        return "torch.func's transforms take plain PyTorch alone"
    if backend == "triton" and tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return f"the tensors are on {tensor.device}, and the current device is cuda:{torch.cuda.current_device()}"
    return unavailable(backend) or limit(backend)


def unavailable(backend: str) -> str | None:
    """Why a backend is not on this machine; None if it is."""
    if backend == "triton":
        return None if has_triton() else "triton is not installed"
    if backend in ("cpu", "cuda") and compiled.module(backend) is None:
        return f"danceopd_kernels.{'_C' if backend == 'cpu' else '_CUDA'} was not built"
    return None


# Nothing to trace. torch.compiler.assume_constant_result would set it, and first import the compiler, which takes
# longer than torch itself.
unavailable._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def choose(
    tensor: torch.Tensor,
    backend: str | None,
    dtypes: tuple[torch.dtype, ...],
    offered: tuple[str, ...] = ("triton",),
    limit: Callable[[str], str | None] = lambda _: None,
) -> str:
    """The backend to run: the one asked for by argument, else by DANCEOPD_KERNELS, else the fastest that can.

    The environment's is passed over where the operation cannot run on it; the argument's is not. limit(backend) says
    why it cannot take arguments of these sizes, or None.

    Raises:
        ValueError: The backend is unknown, or the argument's cannot run.
    """
    if backend is not None and not isinstance(backend, str):
        raise ValueError(f"unknown backend, a {type(backend).__name__}; use one of {', '.join(BACKENDS)}")
    asked = backend or os.environ.get(VARIABLE)
    if asked and asked not in BACKENDS:
        raise ValueError(f"unknown backend {asked!r}; use one of {', '.join(BACKENDS)}")
    reason = refusal(asked, offered, tensor, dtypes, limit) if asked else None
    if backend and reason:
        raise ValueError(f"backend {backend!r} cannot run: {reason}")
    if asked and not reason:
        return asked
    order = ORDER.get(tensor.device.type, ("torch",))
    return next(b for b in order if refusal(b, offered, tensor, dtypes, limit) is None)


def info() -> str:
    """Tells which backends are in use here, and why the rest are not.

    Returns:
        The environment's choice, a line for each backend, and the order on each device.

    Example:
        >>> print(info())
    """
    lines = [f"{VARIABLE}={os.environ.get(VARIABLE, '')}" + ("" if os.environ.get(VARIABLE) else " (not set)")]
    for backend in BACKENDS[1:]:
        reason = unavailable(backend)
        if backend in ("cuda", "triton") and not reason and not torch.cuda.is_available():
            interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
            reason = "no CUDA device" + (", interpreted on request" if interpreted else "")
        detail = f" ({compiled.module('cpu').instruction_set()})" if backend == "cpu" and not reason else ""
        lines.append(f"{backend}: " + (f"not used: {reason}" if reason else f"available{detail}"))
    for device, order in ORDER.items():
        lines.append(f"order on {device}: {', '.join(order)}")
    return "\n".join(lines)
