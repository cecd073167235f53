"""Every operation on every backend, through all in which a kernel may differ from its definition."""

import math
import zlib

import kernel_operations as made
import pytest
import torch
from danceopd_kernels import compiled, dispatch
from danceopd_kernels.steps import limit
from kernel_operations import OPERATIONS, is_float, leaves, mapped
from torch.testing._internal.two_tensor import TwoTensor

CUDA = torch.cuda.is_available()
SMALLEST = torch.finfo(torch.float32).smallest_normal


def cases(which=lambda operation, backend: True):
    """Operations by the places in which each runs on this machine; those on a GPU are marked so."""
    found = []
    for operation in OPERATIONS:
        on_host = [(b, "cpu") for b in operation.backends if b != "cuda" and not (b == "triton" and CUDA)]
        on_device = [(b, "cuda") for b in operation.backends if b != "cpu"]
        for backend, device in on_host + on_device:
            if which(operation, backend):
                marks = [pytest.mark.gpu] if device == "cuda" else []
                there = CUDA if device == "cuda" else True
                if backend in ("cpu", "cuda") and compiled.module(backend) is None:
                    there = False
                marks += [] if there else [pytest.mark.skip(reason=f"no {backend} on {device} here")]
                name = f"{operation.name}-{backend}-{device}".replace(", ", "-").replace(" ", "-")
                found.append(pytest.param(operation, (backend, device), id=name, marks=marks))
    return pytest.mark.parametrize(("operation", "where"), found)


EVERY = cases()
DIFFERENTIABLE = cases(lambda operation, _: operation.gradients)
KERNELS = cases(lambda _, backend: backend != "torch")


def arguments(operation, where, dtype=None, **sizes):
    """Fresh arguments there, the same each time; in one dtype that all backends take if it is not given."""
    torch.manual_seed(zlib.crc32(operation.name.encode()))
    return mapped(lambda _, t: t.to(where[1]), operation.make(dtype=dtype or first_dtype(operation), **sizes))


def first_dtype(operation):
    return next(iter(operation.tolerance))


def places(given):
    """The places of the tensors; of a list of alike ones the last."""
    return [name for name, _ in leaves(given) if not name.startswith(("teachers.0", "uncond.0", "adapters.0"))]


def replaced(given, name, change):
    """The arguments with change(tensor) in one place."""
    return mapped(lambda at, t: change(t) if at == name else t, given)


def run(operation, where, given):
    return operation.call(**given, backend=where[0])


def wide(given):
    """The same in float64, without gradients; z is one of its own."""
    return mapped(lambda _, t: t.detach().double() if is_float(t) else t.clone(), given)


def differentiable(operation, given):
    """The arguments with gradients, and the tensors of them that have one."""
    given = mapped(
        lambda name, t: t.detach().requires_grad_() if name.split(".")[0] in operation.gradients else t, given
    )
    return given, [t for _, t in leaves(given) if t.requires_grad]


def gradients(outputs, tensors, **options):
    """Of the outputs' sum with weights of their own."""
    outputs = [x for x in outputs if x.requires_grad]
    upstream = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, tensors, upstream, **options)


def close(got, wanted, tolerance, smallest=1e-7):
    """got is near the float64 tensor wanted, relative to its largest entry, where that is in the range of got."""
    assert got.shape == wanted.shape
    wanted, largest = wanted.to(got.device), float(wanted.abs().max()) if wanted.numel() else 0.0
    if largest < torch.finfo(got.dtype).max:
        worst = float((got.detach().double() - wanted).abs().max()) if wanted.numel() else 0.0
        assert worst <= tolerance * largest + smallest, (worst, largest)


def same(one, two, within=0.0):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=within, atol=within, equal_nan=True)


# ------------------------------------------------------------------------------------------------- its numbers


@EVERY
@pytest.mark.parametrize("dtype", made.ONE_ROUNDING, ids=str)
@pytest.mark.parametrize("most", [0, 9, 12])
def test_numbers_of_any_size(operation, where, dtype, most):
    """Each argument is scaled by a power of two of its own: no sum on the way may leave the range of half precision."""
    if dtype not in operation.tolerance:
        pytest.skip("of half precision")
    dice = torch.Generator().manual_seed(most)
    scaled = lambda t: t * 2.0 ** int(torch.randint(-most, most + 1, (), generator=dice))  # noqa: E731
    data = lambda t: is_float(t) and t.dtype == dtype and t.dim() > 1  # noqa: E731
    given = mapped(lambda _, t: scaled(t) if data(t) else t, arguments(operation, where, dtype))
    given, tensors = differentiable(operation, given)
    exact, exact_tensors = differentiable(operation, wide(given))
    outputs, wanted = run(operation, where, given), operation.exact(**exact)
    for got, value in zip(outputs, wanted, strict=True):
        assert got.dtype in (dtype, torch.float32)
        close(got, value, operation.tolerance[dtype])
    if tensors:
        for got, value in zip(gradients(outputs, tensors), gradients(wanted, exact_tensors), strict=True):
            assert got.dtype == dtype
            close(got, value, 4 * operation.tolerance[dtype])


@EVERY
@pytest.mark.parametrize("value", [math.inf, math.nan, SMALLEST / 2**10], ids=["infinity", "NaN", "subnormal"])
def test_one_entry_that_is_odd(operation, where, value):
    """What it makes finite of the outputs and the gradients is what it makes finite of the definition's."""

    def odd(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    for name in places(arguments(operation, where)):
        if not is_float(dict(leaves(arguments(operation, where)))[name]):
            continue
        found = []
        for backend in (where[0], "torch"):
            given, tensors = differentiable(operation, replaced(arguments(operation, where), name, odd))
            outputs = operation.call(**given, backend=backend)
            found.append([*outputs, *(gradients(outputs, tensors) if tensors else ())])
        for got, wanted in zip(*found, strict=True):
            assert torch.equal(got.isfinite(), wanted.isfinite()), name
            kept = [torch.where(wanted.isfinite(), x, 0.0).detach() for x in (got, wanted)]
            close(kept[0], kept[1].double(), 4 * operation.tolerance[first_dtype(operation)])


@EVERY
@pytest.mark.parametrize("size", [{"samples": 0}, {"tokens": 0}, {"channels": 0}, {"samples": 1, "tokens": 1}], ids=str)
def test_nothing_or_one(operation, where, size):
    """It is refused in words, or gives what plain PyTorch gives; no gradient is lost."""
    found = []
    for backend in (where[0], "torch"):
        try:
            found.append(operation.call(**arguments(operation, where, **size), backend=backend))
        except ValueError as error:
            found.append(str(error))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        for got, value in zip(*found, strict=True):
            close(got, value.double(), operation.tolerance[first_dtype(operation)])


# ------------------------------------------------------------------------------------------------- its memory


def _behind(tensor):
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


LAYOUTS = {
    "columns first": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "with gaps": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "behind an odd offset": _behind,
    "one row for all": lambda t: t[:1].expand(t.shape) if is_float(t) else t,
    "one entry for all": lambda t: t.flatten()[:1].view([1] * t.dim()).expand(t.shape) if is_float(t) else t,
}


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_place_of_its_entries_changes_nothing(operation, where, layout):
    given = arguments(operation, where)
    twisted = mapped(lambda _, t: LAYOUTS[layout](t), given)
    if operation.in_place:
        for name, tensor in leaves(twisted):
            if not tensor.is_contiguous() and name != "sigmas":
                with pytest.raises(ValueError, match=f"{name} .*contiguous"):
                    run(operation, where, replaced(given, name, lambda _, tensor=tensor: tensor))
        twisted = mapped(lambda name, t: t if name == "sigmas" else t.contiguous().clone(), twisted)
    wanted = run(operation, where, mapped(lambda _, t: t.contiguous().clone(), twisted))
    # A library multiplies matrices in an order of sums that may follow the strides.
    same(run(operation, where, twisted), wanted, within=1e-5 if operation.name == "routed_lora_linear" else 0.0)


@EVERY
def test_what_it_is_given_is_left_alone(operation, where):
    """All but z; and the same call gives the same bits, gradients too."""
    given, tensors = differentiable(operation, arguments(operation, where))
    before = mapped(lambda _, t: t.detach().clone(), given)
    outputs = run(operation, where, given)
    found = gradients(outputs, tensors) if tensors else ()
    for (name, one), (_, two) in zip(leaves(given), leaves(before), strict=True):
        if not (operation.in_place and name == "z"):
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), name
    again, tensors = differentiable(operation, arguments(operation, where))
    outputs_again = run(operation, where, again)
    same(outputs, outputs_again)
    same(found, gradients(outputs_again, tensors) if tensors else ())


@EVERY
def test_one_memory_for_all_that_is_read(operation, where):
    """Arguments of one shape and dtype are one tensor: the same as copies of it."""
    seen = {}

    def shared(name, tensor):
        return tensor if name == "z" else seen.setdefault((tensor.shape, tensor.dtype), tensor)

    given = mapped(shared, arguments(operation, where))
    apart = mapped(lambda _, t: t.clone(), given)
    same(run(operation, where, given), run(operation, where, apart))


IN_PLACE = cases(lambda operation, _: operation.in_place)


@IN_PLACE
def test_z_in_the_memory_of_anything_that_is_read(operation, where):
    """From its beginning, or from its middle where that is as large."""
    for name, tensor in list(leaves(arguments(operation, where))):
        if name == "z":
            continue
        for begin in (0, tensor.numel() // 2 * tensor.itemsize):
            given = arguments(operation, where)
            memory = torch.zeros(2 * given["z"].nbytes, dtype=torch.uint8, device=where[1])
            given["z"] = memory[: given["z"].nbytes].view(torch.float32).view(given["z"].shape)
            given[name] = memory[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            with pytest.raises(ValueError, match=f"z .*must not share memory with {name}"):
                run(operation, where, given)


@IN_PLACE
def test_z_is_what_comes_back_and_a_backward_that_needs_the_old_one_is_refused(operation, where):
    given, factor = arguments(operation, where), torch.ones((), device=where[1], requires_grad=True)
    loss = (given["z"] * factor).sum()
    assert run(operation, where, given)[0] is given["z"]
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@KERNELS
def test_a_tensor_without_memory_is_refused(operation, where):
    """A subclass that answers for its parts, as DTensor does, has none; a negated view has that of the other sign."""
    for name, tensor in list(leaves(arguments(operation, where))):
        given = replaced(arguments(operation, where), name, lambda t: TwoTensor(t, t.clone()))
        with pytest.raises(ValueError, match="memory"):
            run(operation, where, given)
        if is_float(tensor):
            given = replaced(arguments(operation, where), name, torch._neg_view)
            with pytest.raises(ValueError, match=r"resolve_neg\(\)"):
                run(operation, where, given)


PLAIN = cases(lambda _, backend: backend == "torch")


@PLAIN
def test_shapes_of_more_than_two_to_the_31_entries(operation, where):
    """No memory is there for them: on the device meta plain PyTorch gives shapes alone, after all the checks."""
    larger = {made.N: 2**15, made.C: 2**15 + 16}
    small = arguments(operation, where)
    sized = lambda x: [larger.get(n, n) for n in x.shape]  # noqa: E731
    large = mapped(lambda _, t: torch.empty(sized(t), dtype=t.dtype, device="meta"), small)
    assert max(t.numel() for _, t in leaves(large)) > 2**31
    outputs, wanted = operation.call(**large, backend=None), run(operation, where, small)
    assert [(list(x.shape), x.dtype, x.device.type) for x in outputs] == [(sized(x), x.dtype, "meta") for x in wanted]


@pytest.mark.parametrize(
    ("backend", "shape", "said"),
    [
        ("cuda", (65535, 2), None),
        ("cuda", (65536, 2), "65536 samples, 65535 at most"),
        ("triton", (2, 65535 * 4096), None),
        ("triton", (2, 65535 * 4096 + 1), "samples of 268431361 entries, 268431360 at most"),
    ],
)
def test_what_no_grid_of_a_gpu_holds(backend, shape, said):
    """65535 programs fit along a grid's second axis: samples of the compiled kernels, pieces of them of Triton's."""
    assert limit(backend, torch.empty(shape, device="meta")) == said


# ------------------------------------------------------------------------------------------------ its gradients


@EVERY
def test_each_argument_that_requires_a_gradient(operation, where):
    """It has the definition's, or is refused, or is frozen: none is lost without a word."""
    for name in places(arguments(operation, where)):
        if not is_float(dict(leaves(arguments(operation, where)))[name]):
            continue
        one = lambda given, name=name: replaced(given, name, lambda t: t.detach().requires_grad_())  # noqa: E731
        given, head = one(arguments(operation, where)), name.split(".")[0]
        if head in operation.refused:
            with pytest.raises(ValueError, match=f"no gradient passes here, but {head} requires one"):
                run(operation, where, given)
            with torch.no_grad():
                run(operation, where, given)
            continue
        outputs = run(operation, where, given)
        assert any(x.requires_grad for x in outputs) == (head in operation.gradients), name
        if head in operation.gradients:
            exact = one(wide(given))
            [got] = gradients(outputs, dict(leaves(given))[name])
            [wanted] = gradients(operation.exact(**exact), dict(leaves(exact))[name])
            close(got, wanted, 4 * operation.tolerance[first_dtype(operation)])


@DIFFERENTIABLE
def test_a_second_derivative_is_right_or_refused(operation, where):
    given, tensors = differentiable(operation, arguments(operation, where))
    outputs = run(operation, where, given)
    if not (operation.twice and where[0] == "torch"):
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradients(outputs, tensors, create_graph=True)
        return
    exact, exact_tensors = differentiable(operation, wide(given))
    second = [
        torch.autograd.grad(sum(g.square().sum() for g in gradients(x, t, create_graph=True)), t, allow_unused=True)
        for x, t in ((outputs, tensors), (operation.exact(**exact), exact_tensors))
    ]
    for got, wanted in zip(*second, strict=True):
        if got is None or wanted is None:
            assert all(x is None or not x.any() for x in (got, wanted))
        else:
            close(got, wanted, 1e-4)


# ----------------------------------------------------------------------------------------- what torch does with it


@EVERY
def test_autocast_does_not_reach_inside(operation, where):
    given, tensors = differentiable(operation, arguments(operation, where))
    outputs = run(operation, where, given)
    found = gradients(outputs, tensors) if tensors else ()
    given, tensors = differentiable(operation, arguments(operation, where))
    with torch.autocast(where[1], torch.bfloat16):
        again = run(operation, where, given)
    same(again, outputs)
    same(gradients(again, tensors) if tensors else (), found)


@cases(lambda _, backend: backend in ("torch", "cpu"))
def test_torch_compile(operation, where):
    torch._dynamo.reset()
    given, tensors = differentiable(operation, arguments(operation, where))
    outputs = run(operation, where, given)
    found = gradients(outputs, tensors) if tensors else ()
    given, tensors = differentiable(operation, arguments(operation, where))
    compiled_one = torch.compile(lambda given: run(operation, where, given), backend="aot_eager")
    again = compiled_one(given)
    pairs = [*zip(again, outputs, strict=True)]
    pairs += zip(gradients(again, tensors) if tensors else (), found, strict=True)
    for got, wanted in pairs:
        close(got, wanted.detach().double(), 1e-5)


@EVERY
def test_torch_func(operation, where):
    """vmap and grad of the first argument: right in plain PyTorch, else refused in words."""
    first = (*operation.gradients, *operation.refused)[0]
    given = arguments(operation, where)
    name = next(at for at, _ in leaves(given) if at.split(".")[0] == first)
    tensor = dict(leaves(given))[name].clone()

    def call(one):
        return run(operation, where, mapped(lambda at, t: one if at == name else t, given))

    def total(one):
        return sum((x * w).sum() for x, w in zip(call(one), (1.0, 0.5, 0.25, 2.0), strict=False))

    if not operation.transforms or where[0] != "torch":
        for transform in (lambda: torch.func.vmap(call)(tensor[None]), lambda: torch.func.grad(total)(tensor)):
            with pytest.raises(ValueError, match=r"torch\.func|no gradient passes"):
                transform()
        return
    both = torch.stack([tensor, 2 * tensor])
    found = torch.func.vmap(call)(both.clone())
    for i in range(2):
        for got, wanted in zip(found, call(both[i].clone()), strict=True):
            close(got[i], wanted.double(), 1e-5)
    if operation.gradients:
        leaf = tensor.requires_grad_()
        [wanted] = torch.autograd.grad(total(leaf), leaf)
        close(torch.func.grad(total)(tensor.detach()), wanted.double(), 1e-5)


@cases(lambda _, backend: backend != "cpu")
def test_another_stream(operation, where):
    if where[1] != "cuda":
        pytest.skip("streams are a GPU's")
    wanted = run(operation, where, arguments(operation, where))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**7)  # the arguments come late there, and nobody may read them before
        outputs = run(operation, where, arguments(operation, where))
    side.synchronize()
    same(outputs, wanted)


def test_a_limit_of_an_operation_is_passed_over_or_told(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    rows, limit = torch.zeros(2, 3), lambda backend: f"{backend} has no room"
    assert dispatch.choose(rows, None, (torch.float32,), ("cpu",), limit) == "torch"
    if compiled.module("cpu"):
        with pytest.raises(ValueError, match="'cpu' cannot run: cpu has no room"):
            dispatch.choose(rows, "cpu", (torch.float32,), ("cpu",), limit)
