"""Checks of arguments, for every operation: what reaches a kernel as an address has passed here.

Each raises ValueError, for what is of another type too, and says which argument it is and what would fit.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from numbers import Real

import torch
from torch.autograd.function import once_differentiable

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensor(
    name: str,
    value,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    shape: tuple[int | str, ...] | None = None,
    like: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the value if it is a plain tensor that fits.

    Args:
        name: What the message calls it.
        value: Anything.
        dtype: The dtype, or those that will do.
        shape: The size of each axis; for any, its name, which the message shows.
        like: A tensor on whose device it must be.

    Raises:
        ValueError: It is no tensor, or its dtype, shape, device or layout does not fit.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {_kind(value)}")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(f"{name} must be an ordinary dense tensor, got {value.layout}")
    if not torch.compiler.is_compiling() and value.is_neg():  # its memory holds the numbers of the other sign
        raise ValueError(f"{name} is a view of the negative that torch has not written out; give {name}.resolve_neg()")
    if like is not None and has_memory(like) and not has_memory(value):
        raise ValueError(f"{name} must be an ordinary dense tensor, got a {type(value).__name__} without memory")
    if (
        (dtype is None or (value.dtype in dtype if isinstance(dtype, tuple) else value.dtype == dtype))
        and (like is None or value.device == like.device)
        and (shape is None or fits(value.shape, shape))
    ):
        return value
    dtypes = dtype if isinstance(dtype, tuple) else () if dtype is None else (dtype,)
    wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    sizes = "" if shape is None else f" [{', '.join(map(str, shape))}]"
    place = "" if like is None else f" on {like.device}"
    got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    raise ValueError(f"{name} must be {(wanted + sizes).strip() or 'a tensor'}{place}, got {got}")


def has_memory(value: torch.Tensor) -> bool:
    """Returns whether a tensor's address is that of its entries: not if a subclass answers for it, as DTensor does."""
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return True
    return kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def fits(sizes: torch.Size, shape: tuple[int | str, ...]) -> bool:
    """Returns whether the sizes are those of shape, as tensor takes it."""
    if len(sizes) != len(shape):
        return False
    for size, wanted in zip(sizes, shape, strict=True):  # noqa: SIM110  (quicker: it runs at every call)
        if size != wanted and not isinstance(wanted, str):
            return False
    return True


def number(name: str, value) -> float:
    """Returns the value as a float; ValueError for what is no real number, True and False among them."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {_kind(value)}")
    return float(value)


def per_sample(name: str, value, like: torch.Tensor) -> torch.Tensor | None:
    """Returns one number for each sample of like, [B]: float32, or float64 for a like in float64; None stays None.

    Args:
        name: What the message calls it.
        value: A number, or a floating-point tensor of one entry or [B].
        like: [B, ...].

    Raises:
        ValueError: It is neither, or its dtype, shape or device does not fit.
    """
    if value is None:
        return None
    samples, dtype = like.shape[0], torch.promote_types(like.dtype, torch.float32)
    if not isinstance(value, torch.Tensor):
        if isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a number or a tensor [{samples}], got {_kind(value)}")
        return torch.full((samples,), number(name, value), dtype=dtype, device=like.device)  # nothing is copied there
    tensor(name, value, dtype=(*FLOATS, torch.float64), like=like)
    if value.shape not in ((samples,), (1,), ()):
        raise ValueError(f"{name} must be a number or [{samples}], got {list(value.shape)}")
    value = value.detach().to(dtype)
    return (value if value.shape == (samples,) else value.expand(samples)).contiguous()


def index(name: str, value, samples: int, like: torch.Tensor) -> torch.Tensor:
    """Returns an index for each sample, int64 [samples], contiguous; its values are not looked at."""
    return tensor(name, value, dtype=torch.int64, shape=(samples,), like=like).contiguous()


def rows(name: str, value, like: torch.Tensor, most: int) -> list[torch.Tensor]:
    """Returns a tensor, or a list or tuple of 1 to most, as a list: each [n, ...], otherwise as like is, contiguous.

    Raises:
        ValueError: It is something else, holds more or none, or what does not fit.
    """
    if isinstance(value, torch.Tensor):
        value = [value]
    elif not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a tensor or a list of tensors, got {_kind(value)}")
    if not 1 <= len(value) <= most:
        raise ValueError(f"{name} must be 1 to {most} tensors, got {len(value)}")
    shape = ("rows", *like.shape[1:])
    return [tensor(name, one, dtype=like.dtype, shape=shape, like=like).detach().contiguous() for one in value]


def choice(name: str, value, options: tuple[str, ...]) -> str:
    """Returns the value if it is one of the options; ValueError for anything else."""
    if not isinstance(value, str) or value not in options:
        got = repr(value) if isinstance(value, str) else _kind(value)
        raise ValueError(f"unknown {name} {got}; use one of {', '.join(options)}")
    return value


def in_place(name: str, value, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns a tensor that a kernel may write over: contiguous, apart from its inputs, and unknown to autograd.

    Args:
        name: What the message calls it.
        value: A tensor, checked already.
        inputs: What the kernel reads meanwhile, by name, contiguous.

    Raises:
        ValueError: It is not, or a gradient would be lost.
    """
    if not value.is_contiguous():
        raise ValueError(f"{name} is changed in place and must be contiguous, got strides {value.stride()}")
    no_gradient(**{name: value}, **inputs)
    if value.is_meta or torch.compiler.is_compiling():  # there are no addresses
        return value
    if not has_memory(value) or transforming():
        return value
    begin = value.data_ptr()
    for other, tensor in inputs.items():
        if tensor.numel() and begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < begin + value.nbytes:
            raise ValueError(f"{name} is changed in place and must not share memory with {other}")
    return value


def no_gradient(**tensors) -> None:
    """Raises ValueError for a tensor that requires a gradient, which would be lost, while gradients are recorded."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"no gradient passes here, but {name} requires one; detach it or use torch.no_grad()")


def transforming() -> bool:
    """Returns whether one of torch.func's transforms is at work, whose tensors have no memory either."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def no_transform(operation: str) -> None:
    """Raises ValueError under torch.func's transforms, for an operation that has no plain PyTorch to differentiate."""
    if transforming():
        raise ValueError(f"{operation} does not run under torch.func (grad, vmap, jvp); use torch.autograd.grad")


def own_precision(device: torch.device) -> AbstractContextManager:
    """Keeps autocast out: the dtypes of an operation are those of its arguments."""
    kind = device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def first_derivative_alone() -> None:
    """Raises RuntimeError in a backward that is to be differentiated again: what it gives would count as a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "this operation has no second derivative, so that create_graph=True is refused; plain PyTorch has one of "
            "routed_velocity_mse, routed_lora_linear and adaln_modulate: backend='torch'"
        )


def once(backward: Callable) -> Callable:
    """Marks the backward of an autograd.Function as one that cannot be differentiated again, and is refused then."""
    plain = once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *upstream):
        first_derivative_alone()
        return plain(ctx, *upstream)

    return checked


def flag(name: str, value) -> bool:
    """Returns the value if it is True or False; ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {_kind(value)}")
    return value


def _kind(value) -> str:
    if value is None:
        return "None"
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        return f"the number {value}"
    return f"a {type(value).__name__}"
