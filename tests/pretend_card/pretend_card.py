"""A pretend card: a device named `card` whose tensors hold their numbers on the CPU, and behave as CUDA's do.

`with pretend_card() as card:` makes `device="card"` and `.to("card")` work. A tensor there refuses to meet one of the
CPU, as CUDA's tensors do, and what would make a CUDA card's host wait is noted in `card.waits` with the line of code
that did it: a value read on the host, a shape that depends on values, a copy to the host, and a copy to the card that
is not both from pinned memory and without blocking. Inside `card.no_waits()` the same raises `HostWait`. Operations
compute on the CPU, so that a run on the card can be held against the same run on the CPU, bit for bit.
"""

import linecache
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pretend_autocast import cast_inputs
from pretend_module import CardModule
from pretend_trees import tree_leaves, tree_map
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"
ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "danceopd"), str(ROOT / "kernels"))
TORCH = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"] + "/")  # lines that are nobody's own

BOTH_SIDES = {"aten::_to_copy", "aten::copy_"}  # the operations that may see tensors of both sides
# Their answer, or the shape of it, is needed on the host.
READS = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_consecutive", "_unique2"),
    *("unique_dim", "bincount", "repeat_interleave.Tensor", "allclose", "_linalg_check_errors", "item"),
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class HostWait(RuntimeError):
    """Says which line would have made the host wait for the card."""


class WrongSide(RuntimeError):
    """Says which operation met tensors of both sides, and where."""


@dataclass(frozen=True)
class Wait:
    """One wait of the host.

    Attributes:
        what: The operation, and why it waits.
        line: The innermost line of code outside of torch, "danceopd/core/rollout.py:91: the code there".
        phase: The phase of the update that it is in; "" outside.
    """

    what: str
    line: str
    phase: str

    def __str__(self) -> str:
        return f"{self.what} at {self.line}" + (f" [{self.phase}]" if self.phase else "")


class CardTensor(torch.Tensor):
    """A tensor that says it lies on the card; `numbers` is a tensor of the CPU."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, memory=None):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=torch.device(NAME, 0),
        )
        made.numbers, made._memory = numbers, memory
        return made

    def __init__(self, numbers: torch.Tensor, memory=None):
        pass

    def __repr__(self, *, tensor_contents=None):
        return f"CardTensor({self.numbers})"

    is_cuda = True  # to whoever asks whether it is a card's

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self):
        return self.numbers.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone()
            of_module = getattr(self, "_is_param", False)
            memo[id(self)] = torch.nn.Parameter(copied) if of_module else copied
            memo[id(self)].requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # as CUDA's, once it is read again with map_location="cpu"
        CURRENT.wait("a copy to the host, to be written")
        return self.numbers.detach().__reduce_ex__(protocol)

    def __tensor_flatten__(self):  # so that a module's _apply swaps its parameters
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return CardTensor(inner["numbers"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return CURRENT.run(func, args, kwargs or {})


class PretendCard:
    """The card's state; `pretend_card` makes one.

    Attributes:
        waits: Every wait of the host so far.
        module: What `torch.card` is: streams, memory, graphs.
    """

    def __init__(self):
        self.waits: list[Wait] = []
        self.waited = 0  # how often, whoever empties the list
        self.module = getattr(torch, NAME)
        self.module.begin(self)
        self.refusing = 0
        self.follows_data = False  # whether `x.data = y` is followed; diffusers' offloading does not run with it yet
        self.phases: list[str] = []
        self._pinned: dict[int, StorageWeakRef] = {}

    # --- waits ----------------------------------------------------------------------------------------

    def wait(self, what: str) -> None:
        """Notes a wait of the host, or raises it where none may be."""
        found = Wait(what, _line(), self.phases[-1] if self.phases else "")
        if self.module.capturing is not None:
            raise HostWait(f"in a capture: {found}")
        if self.refusing:
            raise HostWait(str(found))
        self.waits.append(found)
        self.waited += 1

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        """Makes every wait inside raise `HostWait`."""
        self.refusing += 1
        try:
            yield
        finally:
            self.refusing -= 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Is entered around every phase of an update (`danceopd.core.phase.recorders`)."""
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.pop()

    # --- pinned memory --------------------------------------------------------------------------------

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor of the CPU into pinned memory."""
        if isinstance(tensor, CardTensor):
            raise WrongSide(f"only tensors of the CPU can be pinned, at {_line()}")
        if self.is_pinned(tensor):
            return tensor
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise RuntimeError(f"an expanded tensor cannot be pinned, its rows share memory, at {_line()}")
        copied = tensor.detach().clone()
        self._pinned[copied.untyped_storage()._cdata] = StorageWeakRef(copied.untyped_storage())
        return copied

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, CardTensor):
            return False
        known = self._pinned.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    # --- operations -----------------------------------------------------------------------------------

    def run(self, func, args, kwargs):
        """Runs one operation on the numbers, after the checks that a card would make."""
        name = func.name().partition(".")[0]
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_card = any(isinstance(x, CardTensor) for x in leaves)
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        if not on_card and (device is None or device.type != NAME):
            return func(*args, **kwargs)
        if on_card:
            self._check_sides(name, args, leaves)
            self._check_waits(func, name, args)
        if name in BOTH_SIDES:
            self._check_copy(name, args, kwargs, device)
        if (generator := kwargs.get("generator")) is not None and generator.device.type == "cpu":
            raise WrongSide(f"{name}: a generator of the CPU for a tensor on the card, at {_line()}")
        return self._compute(func, name, args, kwargs, device, on_card)

    def _compute(self, func, name, args, kwargs, device, on_card):
        outer = {}

        def inner(x):
            if isinstance(x, CardTensor):
                outer[id(x.numbers)] = x
                return x.numbers
            return x

        inner_args, inner_kwargs = tree_map(inner, (args, kwargs))
        if device is not None:
            on_card, inner_kwargs["device"] = device.type == NAME, torch.device("cpu")
        inner_kwargs.pop("pin_memory", None)
        if name in RANDOM and on_card and inner_kwargs.get("generator") is None:
            func, inner_kwargs["generator"] = _drawing(func), self.module.generator
        if name == "aten::_to_copy":  # the numbers are there at once
            inner_kwargs.pop("non_blocking", None)
        module, graph = self.module, self.module.capturing
        read = {id(x._memory): x._memory for x in outer.values() if x._memory is not None}
        module.read(read.values(), name)
        if graph is not None:
            graph.before(func, inner_args, inner_kwargs)
        result = func(*inner_args, **inner_kwargs)
        if not on_card:
            return result
        if torch.Tag.inplace_view in func.tags:  # squeeze_ and the like: the outer tensor's shape changes too
            with no_dispatch():
                func(*args, **kwargs)
        if graph is not None:
            graph.record(module, func, inner_args, inner_kwargs, result)

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            return outer.get(id(x)) if id(x) in outer else self.wrapped(x)

        wrapped = tree_map(wrap, result)
        made = (x._memory for x in tree_leaves(wrapped) if isinstance(x, CardTensor) and x._memory is not None)
        module.wrote(memory for memory in made if id(memory) not in read)  # not views
        if func._schema.is_mutable:
            module.wrote(_written(func, args))
        return wrapped

    def wrapped(self, numbers: torch.Tensor) -> CardTensor:
        """Puts a tensor on the card; tensors of one storage share the memory that is counted."""
        if type(numbers) is not torch.Tensor:
            numbers = numbers.as_subclass(torch.Tensor)
        return CardTensor(numbers, self.module.memory_of(numbers))

    def _check_sides(self, name, args, leaves) -> None:
        strangers = [x for x in leaves if not isinstance(x, CardTensor) and x.dim()]
        if not strangers or name in BOTH_SIDES:
            return
        if name in INDEXING and isinstance(args[0], CardTensor):  # CUDA copies them there
            values = [x for x in args[2:3] if isinstance(x, torch.Tensor) and not isinstance(x, CardTensor) and x.dim()]
            if not values:
                self.wait(f"{name} with indices of the host, which are copied to the card")
                return
        shapes = [tuple(x.shape) for x in strangers]
        raise WrongSide(f"{name}: tensors on the card meet tensors on the CPU, of shapes {shapes}, at {_line()}")

    def _check_waits(self, func, name, args) -> None:
        short = name.removeprefix("aten::")
        if short in READS or func.name().removeprefix("aten::") in READS:
            self.wait(f"{name}, which is read on the host")
        elif name in INDEXING and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.wait(f"{name} by a mask, whose shape depends on values")

    def _check_copy(self, name, args, kwargs, device) -> None:
        if name == "aten::copy_":
            target, source = args[0], args[1]
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            to_card, from_card = isinstance(target, CardTensor), isinstance(source, CardTensor)
        else:
            source, non_blocking = args[0], kwargs.get("non_blocking", False)
            from_card = isinstance(source, CardTensor)
            to_card = from_card if device is None else device.type == NAME
        if from_card and not to_card:
            self.wait(f"{name} to the host")
        elif to_card and not from_card and not (non_blocking and self.is_pinned(source)):
            how = "from memory that is not pinned" if non_blocking else "that blocks"
            self.wait(f"{name} to the card {how}")


MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)  # as they are now: a capture replaces two of them
RANDOM = {
    *("aten::rand", "aten::randn", "aten::randint", "aten::randperm", "aten::normal_", "aten::uniform_"),
    *("aten::bernoulli_", "aten::multinomial", "aten::exponential_", "aten::random_", "aten::normal"),
}

CURRENT: "PretendCard | None" = None


def _written(func, args) -> list:
    """Finds the memory of what an operation changes in place."""
    arguments = func._schema.arguments
    found = [x for x, a in zip(args, arguments, strict=False) if a.alias_info is not None and a.alias_info.is_write]
    return [x._memory for x in tree_leaves(found) if isinstance(x, CardTensor) and x._memory is not None]


def _drawing(func):
    """Finds the overload of a random operation that takes a generator."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    return getattr(func._overloadpacket, "low_generator" if func._overloadname == "low" else "generator")


def _line() -> str:
    """Returns the innermost line of the package, else of whoever is neither torch nor one of the device's modules."""
    frame, chosen = sys._getframe(1), None
    while frame is not None:
        file = frame.f_code.co_filename
        if not (file.startswith((*TORCH, "<")) or Path(file).name.startswith("pretend_")):
            chosen = chosen or frame
            if file.startswith(OURS):
                chosen = frame
                break
            if file.startswith(str(ROOT / "tests")):
                break
        frame = frame.f_back
    if chosen is None:
        return f"a thread of autograd ({threading.current_thread().name})"
    file, number = chosen.f_code.co_filename, chosen.f_lineno
    return f"{file.removeprefix(f'{ROOT}/')}:{number}: {linecache.getline(file, number).strip()}"


class _Dispatch(TorchDispatchMode):
    def __init__(self, card: PretendCard):
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.card.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Sees what does not come to the dispatch mode: pinning, tensors made of host data, `data`, and autocast."""

    def __init__(self, card: PretendCard, autocast_as: str):
        super().__init__()
        self.card, self.autocast_as = card, autocast_as

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            return self.card.pin(args[0])
        if func is torch.Tensor.is_pinned:
            return self.card.is_pinned(args[0])
        if func is torch.Tensor.record_stream:
            return None
        if func in MAKERS and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type == NAME and not isinstance(args[0], CardTensor):
                return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        follows = self.card is not None and self.card.follows_data and func == torch.Tensor.data.__set__
        if follows and isinstance(args[0], CardTensor) and isinstance(args[1], CardTensor):
            args[0].numbers, args[0]._memory = args[1].numbers, args[1]._memory
        if func is torch.Tensor.numpy and isinstance(args[0], CardTensor):
            raise WrongSide(f"numpy() of a tensor on the card, at {_line()}")
        if torch.is_autocast_enabled(self.autocast_as):
            args, kwargs = cast_inputs(func, args, kwargs, torch.get_autocast_dtype(self.autocast_as))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Takes the CPU's fused attention where the CPU would; torch chooses it by the device's name."""
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if isinstance(query, CardTensor) and not enable_gqa:
        mask = attn_mask.numbers if isinstance(attn_mask, CardTensor) else attn_mask
        numbers = [x.numbers.detach() for x in (query, key, value)]
        chosen = torch._fused_sdp_choice(*numbers, mask, dropout_p, is_causal, **options)
        if chosen == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)


@contextmanager
def pretend_card() -> Iterator[PretendCard]:
    """Makes the card there inside: `torch.device("card")`, `torch.card`, autocast by CUDA's lists.

    Returns:
        The context of the card.
    """
    global CURRENT
    from danceopd.core import phase

    register()
    card = CURRENT = PretendCard()
    phase.recorders.append(card.phase)
    try:
        with _Functions(card, NAME) as functions, _Dispatch(card), _backwards_under(functions):
            yield card
    finally:
        phase.recorders.remove(card.phase)
        card.module.end()
        CURRENT = None


@contextmanager
def _backwards_under(mode: TorchFunctionMode) -> Iterator[None]:
    """Runs backwards in this thread and with the mode, which what they compute again must see as it did before."""
    before = torch.autograd._engine_run_backward

    def run(*args, **kwargs):
        with mode:
            return before(*args, **kwargs)

    torch.autograd._engine_run_backward = run
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch.autograd._engine_run_backward = before


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Makes autocast on the CPU cast as CUDA's does, for the run that one on the card is held against."""
    with _Functions(None, "cpu"):
        yield


class _Module(CardModule):
    """The same for the whole process, as torch takes it once; there is a card only inside of `pretend_card`."""

    def is_available(self) -> bool:
        return CURRENT is not None

    def device_count(self) -> int:
        return int(CURRENT is not None)


def register() -> None:
    """Tells torch of the device: once in a process, and before its first backward, which counts the devices."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        _FALLBACK.fallback(torch.library.fallthrough_kernel)  # the casts are made in `_Functions`
        for name in ("silu_backward", "mish_backward"):  # of which torch takes apart what is not the CPU's or CUDA's
            _KERNELS.impl(name, _never)


def _never(*args):
    raise AssertionError("the card's tensors compute in CardTensor.__torch_dispatch__")


_KERNELS = torch.library.Library("aten", "IMPL", "PrivateUse1")
_FALLBACK = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
