"""Sees on the meta device what a forward and its backward hold at once, and counts a forward's operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from danceopd.core.conditioning import Conditioning
from danceopd.models.footprint import forward_bytes, most_alive
from danceopd.planning.remembered import Remembered
from danceopd.support.errors import UserError

_seen: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()  # what operations gave in looks at a student


class _Attention(torch.autograd.Function):
    """Attention without values, which keeps what a fused one keeps: its inputs and its output.

    Its backward makes the three gradients, and in half precision a sum of the query's in float32, as FlashAttention's.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _ = ctx.saved_tensors
        found = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        _summed = query.new_empty(query.shape, dtype=torch.float32) if query.dtype != torch.float32 else None
        return found


class _AsOnDevice(TorchFunctionMode):
    """On the meta device torch's own attention would keep the whole matrix of scores, and autocast does nothing.

    autocast: the dtype that it would run products in on a GPU, norms in float32; casts: of the parameters, each made
    once in a forward, whatever the number of samples.
    """

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        self.autocast = autocast
        self.casts: dict[int, torch.Tensor] = {}

    @contextmanager
    def again(self) -> Iterator[None]:
        """Gives the context of a block that a backward computes again; casts last as long as it."""
        self.casts.clear()
        with self, _HostMasks():
            yield
        self.casts.clear()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.autocast and function in (F.linear, F.conv2d, F.scaled_dot_product_attention):
            args, kwargs = tree_map(self._cast, (args, kwargs))
        elif self.autocast and function in (F.layer_norm, F.rms_norm):
            args, kwargs = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return function(*args, **kwargs)

    def _cast(self, value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self.autocast)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(self.autocast)
        return self.casts[id(value)]

    @staticmethod
    def _attend(query, key, value, *_, **__):
        return _Attention.apply(query, key, value)


class _HostMasks(TorchFunctionMode):
    """A mask that a transformer reads on the host has values, and yet chooses among tensors of the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.where and len(args) == 3 and isinstance(args[1], torch.Tensor) and args[1].is_meta:
            args = (args[0].to("meta"), *args[1:])
        return function(*args, **(kwargs or {}))


class _Adapted(torch.autograd.Function):
    """A linear layer with an adapter, which keeps what the kernel keeps: its input, that times A, and the weight.

    Its backward makes the gradients of all that, and numbers of a weight that is codes.
    """

    @staticmethod
    def forward(ctx, x, weight, a, b):
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], len(a)), weight)
        ctx.factors = a, b
        return x.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, h, weight = ctx.saved_tensors
        a, b = (torch.empty_like(factor) for factor in ctx.factors)
        _h = torch.empty_like(h)
        _numbers = weight.new_empty(weight.shape, dtype=x.dtype) if weight.dtype != x.dtype else None
        return torch.empty_like(x) if ctx.needs_input_grad[0] else None, None, a, b


def held_in_update(
    student: nn.Module,
    shape: tuple[int, ...],
    conditioning: Conditioning,
    rows: int = 1,
    autocast: torch.dtype | None = None,
    checkpointed: bool = False,
    first: bool = False,
) -> int:
    """Returns the most bytes that a forward and its backward hold at once, beside weights, their casts and inputs.

    Args:
        student: On the meta device.
        shape: Of one sample's latents.
        conditioning: Of one sample.
        rows: So many samples like it.
        autocast: The dtype of products; copies of the parameters in it are not counted.
        checkpointed: Whether the backward computes blocks again.
        first: Whether gradients are made, and counted; else they are there and added to.
    """
    device, transformer = _AsOnDevice(autocast), getattr(student, "transformer", None)

    def run(block, *args):
        contexts = lambda: (nullcontext(), device.again())  # noqa: E731
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def held(place: str) -> int:
        for parameter in student.parameters():
            parameter.grad = None if first else torch.empty_like(parameter)
        casts = 0
        device.casts.clear()

        def update():
            nonlocal casts
            velocity = _forward(student, shape, conditioning, place, rows)
            casts = sum(cast.nbytes for cast in device.casts.values())
            device.casts.clear()  # autocast forgets them with the forward
            velocity.backward(torch.empty_like(velocity))  # outside of the mode, as torch has it

        with device:
            most = most_alive(update)
        return max(0, most - casts)

    if checkpointed and hasattr(student, "layer"):
        student.enable_gradient_checkpointing(device.again)
    elif checkpointed:
        transformer.enable_gradient_checkpointing(run)
    try:
        return _looked_at(student, _adapted, held)
    finally:
        for parameter in student.parameters():
            parameter.grad = None
        if checkpointed:
            transformer.disable_gradient_checkpointing()


@torch.no_grad()
def held_in_forward(
    student: nn.Module,
    shape: tuple[int, ...],
    conditioning: Conditioning,
    rows: int = 1,
    autocast: torch.dtype | None = None,
) -> int:
    """Returns the most bytes that a forward without gradient holds at once, beside weights, their casts and inputs.

    Args:
        student: On the meta device.
        shape: Of one sample's latents.
        conditioning: Of one sample.
        rows: So many samples like it.
        autocast: The dtype of products.
    """

    def held(place: str) -> int:
        with _AsOnDevice(autocast) as device:
            most = forward_bytes(lambda: _forward(student, shape, conditioning, place, rows))
        return most - sum(cast.nbytes for cast in device.casts.values())

    return _looked_at(student, _adapted, held)


@torch.no_grad()
def operations(student: nn.Module, shape: tuple[int, ...], conditioning: Conditioning) -> int:
    """Counts the floating-point operations of a forward of one sample; a multiplication and its addition are two.

    Args:
        student: On the meta device.
        shape: Of one sample's latents.
        conditioning: Of one sample.
    """

    def counted(place: str) -> int:
        with FlopCounterMode(display=False) as counter:
            _forward(student, shape, conditioning, place)
        return counter.get_total_flops()

    return _looked_at(student, _plain_adapted, counted)


def _looked_at(student: nn.Module, adapted: Callable, look: Callable[[str], int]) -> int:
    """Returns what `look` finds, with `adapted` for an adapter's layers, by the place where lengths and masks may be.

    Some families read lengths and masks on the host, others want them where the rest is.

    Raises:
        UserError: The transformer does not take what it is given, at either place.
    """
    adapter = hasattr(student, "layer")
    if adapter:
        student.layer = lambda name, x, weight, *_: adapted(student, name, x, weight)
    try:
        with Remembered(_seen.setdefault(student, {})):
            try:
                return look("meta")
            except RuntimeError:
                return look("cpu")
    except RuntimeError as error:
        [line, *_] = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"the transformer's forward does not take what these rows hold: {line}") from error
    finally:
        if adapter:
            del student.layer


def _plain_adapted(student: nn.Module, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    a, b = student.factors_of(name)
    base = x.new_empty(weight.shape)  # whatever a weight of 8 bits is
    return F.linear(x, base) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def _forward(student: nn.Module, shape, conditioning: Conditioning, place: str, rows: int = 1) -> torch.Tensor:
    def move(value: torch.Tensor) -> torch.Tensor:
        value = value.to("meta" if value.is_floating_point() else place)
        return value.expand(rows, *value.shape[1:]).clone()

    prompt = tree_map(move, conditioning.prompt)
    source = None if conditioning.source is None else tree_map(move, conditioning.source)
    has_source = None if conditioning.has_source is None else conditioning.has_source.expand(rows)
    latents, sigma = torch.empty(rows, *shape, device="meta"), torch.empty(rows, device="meta")
    with _HostMasks():
        return student(latents, sigma, Conditioning(prompt, source, has_source))


def _adapted(student: nn.Module, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _Adapted.apply(x, weight, *student.factors_of(name))


def conditioning_bytes(conditioning: Conditioning) -> int:
    """Returns the bytes of a conditioning's prompts and source pictures."""
    values = tree_flatten((conditioning.prompt, conditioning.source, conditioning.texts))[0]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
