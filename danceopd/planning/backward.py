"""Sees on a forward on the meta device what a backward keeps, and counts a forward's operations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

from danceopd.core.conditioning import Conditioning
from danceopd.models.eight_bit import stored
from danceopd.models.footprint import forward_bytes


class _Attention(torch.autograd.Function):
    """Attention without values, which keeps what a fused one keeps: its inputs and its output."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


class _AsOnDevice(TorchFunctionMode):
    """On the meta device torch's own attention would keep the whole matrix of scores, and autocast does nothing.

    autocast: the dtype that it would run products in on a GPU, norms in float32; casts: of the parameters, each made
    once in a forward, whatever the number of samples.
    """

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        self.autocast = autocast
        self.casts: dict[int, torch.Tensor] = {}

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
    """A linear layer with an adapter, which keeps what the kernel keeps: its input, that times A, and the weight."""

    @staticmethod
    def forward(ctx, x, weight, a, b):
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], len(a)), weight)
        return x.new_empty(*x.shape[:-1], len(weight))


class _Kept:
    """The storages that a forward keeps for its backward."""

    def __init__(self):
        self.storages: dict[int, torch.UntypedStorage] = {}  # they stay alive, so that no number comes twice

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def bytes_without(self, *others: "_Kept") -> int:
        seen = {key for other in others for key in other.storages}
        return sum(storage.nbytes() for key, storage in self.storages.items() if key not in seen)


# Long: the sets of storages that it tells apart are filled in one forward.
def kept_for_backward(
    student: nn.Module,
    transformer: nn.Module | None,
    shape: tuple[int, ...],
    conditioning: Conditioning,
    autocast: torch.dtype | None = None,
) -> tuple[int, int | None]:
    """Counts the bytes that a forward of one sample keeps for its backward.

    Args:
        student: On the meta device.
        transformer: The one under its adapter, or its own, whose blocks a checkpointed run computes again, one at a
            time; None where nothing can be.
        shape: Of one sample's latents.
        conditioning: Of one sample.
        autocast: The dtype of products; copies of the parameters in it are not counted.

    Returns:
        The bytes without and with gradient checkpointing, the second None without a transformer.
    """
    fixed, outside, inputs, blocks = _Kept(), _Kept(), _Kept(), []
    for network in filter(None, (student, transformer)):
        for tensor in (*network.parameters(), *network.buffers()):
            for part in stored(tensor):
                fixed.add(part)

    def block(module, *args):
        inside = _Kept()
        for value in tree_flatten(args)[0]:
            if isinstance(value, torch.Tensor):
                inputs.add(value)
        with inside.hooks():
            result = module(*args)
        blocks.append(inside)
        return result

    if transformer is not None:
        transformer.enable_gradient_checkpointing(block)
    adapter = hasattr(student, "layer")
    if adapter:
        student.layer = lambda name, x, weight, *_: _adapted(student, name, x, weight)
    # Some families read lengths and masks on the host, others want them where the rest is.
    for place in ("meta", "cpu"):
        try:
            with _AsOnDevice(autocast) as device, outside.hooks():
                _forward(student, shape, conditioning, place)
            break
        except RuntimeError:
            if place == "cpu":
                raise
            outside, inputs, blocks = _Kept(), _Kept(), []
    if transformer is not None:
        transformer.disable_gradient_checkpointing()
    if adapter:
        del student.layer
    for cast in device.casts.values():
        fixed.add(cast)
    everything = _Kept()
    for part in (outside, *blocks):
        everything.storages |= part.storages
    plain = everything.bytes_without(fixed)
    if transformer is None:
        return plain, None
    kept = _Kept()
    kept.storages = outside.storages | inputs.storages
    return plain, kept.bytes_without(fixed) + max((b.bytes_without(fixed, kept) for b in blocks), default=0)


@torch.no_grad()
def held_in_forward(
    student: nn.Module, shape: tuple[int, ...], conditioning: Conditioning, autocast: torch.dtype | None = None
) -> int:
    """Returns the most bytes that one row of a forward without gradient holds at once, beside weights and inputs.

    Args:
        student: On the meta device.
        shape: Of one sample's latents.
        conditioning: Of one sample.
        autocast: The dtype of products.
    """

    def held(place: str) -> int:
        with _AsOnDevice(autocast) as device:
            most = forward_bytes(lambda: _forward(student, shape, conditioning, place))
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
    """
    adapter = hasattr(student, "layer")
    if adapter:
        student.layer = lambda name, x, weight, *_: adapted(student, name, x, weight)
    try:
        try:
            return look("meta")
        except RuntimeError:
            return look("cpu")
    finally:
        if adapter:
            del student.layer


def _plain_adapted(student: nn.Module, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    a, b = student.factors_of(name)
    base = x.new_empty(weight.shape)  # whatever a weight of 8 bits is
    return F.linear(x, base) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def _forward(student: nn.Module, shape, conditioning: Conditioning, place: str) -> torch.Tensor:
    def move(value: torch.Tensor) -> torch.Tensor:
        return value.to("meta" if value.is_floating_point() else place)

    prompt = tree_map(move, conditioning.prompt)
    source = None if conditioning.source is None else tree_map(move, conditioning.source)
    latents, sigma = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    with _HostMasks():
        return student(latents, sigma, Conditioning(prompt, source, conditioning.has_source))


def _adapted(student: nn.Module, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _Adapted.apply(x, weight, *student.factors_of(name))


def conditioning_bytes(conditioning: Conditioning) -> int:
    """Returns the bytes of a conditioning's prompts and source pictures."""
    values = tree_flatten((conditioning.prompt, conditioning.source, conditioning.texts))[0]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
