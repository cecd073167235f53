"""Every operation answers a wrong argument by ValueError in words, and never by a crash: thrown at all of them."""

import copy
from contextlib import suppress

import danceopd_kernels as k
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_operations import OPERATIONS, B, C, N, Operation, P

PACK = Operation("pack_adapters", lambda adapters, scale, backend: k.pack_adapters(adapters, scale),
                 lambda dtype: {"adapters": [(torch.randn(2, C), torch.randn(P, 2))], "scale": [1.0]}, None,
                 {torch.float32: 0.0}, ("torch",))  # fmt: skip
BY_BACKEND = [pytest.param(o, b, id=f"{o.name}-{b}") for o in (*OPERATIONS, PACK) for b in o.backends if b != "cuda"]


def arguments(operation):
    return operation.make(dtype=next(iter(operation.tolerance)))


def run(operation, backend, given):
    with torch.no_grad():
        return operation.call(**given, backend=backend)


def wrong_everywhere():
    """What no argument of any operation takes."""
    return [
        object(),
        {"a": 1},
        "velocity",
        np.zeros((B, N, C), np.float32),
        [1, None],
        (torch.zeros(B), "x"),
        torch.zeros(B, N, C, dtype=torch.complex64),
        torch.zeros(B, dtype=torch.uint8),
        torch.zeros(2, 2, 2, 2, 2, 2, 2),
        torch.zeros(B, N, C, dtype=torch.int64),
        torch.eye(B).to_sparse(),
        torch.zeros((), dtype=torch.int64),
        float,
        lambda: 0,
    ]


def maybe_wrong():
    """Tensors, numbers and lists that fit nothing, or by chance something."""
    shapes = st.lists(st.sampled_from((0, 1, 2, B, N, C, P)), max_size=4)
    dtypes = st.sampled_from(
        (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
    )
    plain = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, dtypes)
    ready = st.sampled_from([(B, N, C), (B, C), (P, C), (B,), (C,), (P,)])
    overlapping = ready.map(lambda shape: torch.ones(1).expand(shape))
    strided = ready.map(lambda shape: torch.ones(*shape, 2)[..., 0])
    elsewhere = ready.map(lambda shape: torch.ones(shape, device="meta"))
    indices = st.lists(st.sampled_from((-(2**62), -1, 0, 1, 2, 5, 2**62)), min_size=B, max_size=B).map(torch.tensor)
    leaf = ready.map(lambda shape: torch.ones(shape, requires_grad=True))
    numbers = st.sampled_from((None, True, 0, -1, 3, 2**70, 0.5, float("nan"), float("inf"), 1j))
    tensors = st.one_of(plain, overlapping, strided, elsewhere, indices, leaf)
    lists = st.lists(tensors, max_size=9) | st.lists(st.tuples(tensors, tensors), max_size=3)
    return st.one_of(tensors, numbers, lists, st.sampled_from(wrong_everywhere()))


@pytest.mark.parametrize(("operation", "backend"), BY_BACKEND)
def test_what_fits_nothing_is_refused_and_named(operation, backend):
    if backend == "cpu" and k.compiled.module("cpu") is None:
        pytest.skip("the cpu module was not built")
    run(operation, backend, arguments(operation))
    for name, value in arguments(operation).items():
        for junk in wrong_everywhere():
            # What the others are compared with may be the odd one by its shape alone: then they are named.
            odd = isinstance(junk, torch.Tensor) and junk.dtype == torch.float32
            with pytest.raises(ValueError, match=r"\w+ \w+" if odd else name.removesuffix("s").replace("_", "[_ ]")):
                run(operation, backend, arguments(operation) | {name: junk})
        if isinstance(value, k.Head):
            for part in value._fields:
                for junk in (None, *wrong_everywhere()):
                    with pytest.raises(ValueError, match=f"{name}.*: {part} must be"):
                        run(operation, backend, arguments(operation) | {name: value._replace(**{part: junk})})
            with pytest.raises(ValueError, match=f"{name} must be a Head"):
                run(operation, backend, arguments(operation) | {name: tuple(value)})


@pytest.mark.parametrize(("operation", "backend"), BY_BACKEND)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_argument_ends_the_process(operation, backend, data):
    """One to three arguments are replaced: the operation runs, or says what does not fit."""
    if backend == "cpu" and k.compiled.module("cpu") is None:
        pytest.skip("the cpu module was not built")
    given = arguments(operation)
    changed = data.draw(st.lists(st.sampled_from(sorted(given)), min_size=1, max_size=3, unique=True))
    given |= {name: copy.copy(data.draw(maybe_wrong(), label=name)) for name in changed}
    with torch.set_grad_enabled(data.draw(st.booleans(), label="gradients are recorded")), suppress(ValueError):
        operation.call(**given, backend=backend)
