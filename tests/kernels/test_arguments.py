"""Every operation answers a wrong argument by ValueError in words, and never by a crash: thrown at all of them."""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import danceopd_kernels as k
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

B, N, C, P = 3, 4, 16, 8


@dataclass(frozen=True)
class Operation:
    """call(**arguments) on a backend; arguments: fresh ones that fit, None where one may be left out."""

    name: str
    call: Callable
    arguments: Callable[[], dict]
    backends: tuple[str, ...]


def randn(*shape):
    return torch.randn(*shape)


def routed():
    return {
        "student": randn(B, N, C),
        "teachers": [randn(5, N, C), randn(2, N, C)],
        "route": torch.tensor([0, 1, 0]),
        "row": torch.tensor([4, 1, 0]),
        "uncond": [randn(5, N, C), randn(2, N, C)],
        "uncond_row": torch.tensor([0, 0, 3]),
        "guidance_scale": torch.ones(B),
        "weight": torch.ones(B),
        "mask": torch.ones(B, N, dtype=torch.bool),
        "reduction": "mean",
        "norms": True,
    }


def head(n, width=C):
    return k.Head(randn(n, N, width), randn(n, width), randn(n, width), randn(P, width), randn(P))


def heads():
    uncond = [(randn(n, N, C), randn(n, C), randn(n, C)) for n in (1, 2)]
    rest = {"guidance_scale": torch.ones(B), "weight": torch.ones(B), "mask": torch.ones(B, N, dtype=torch.bool)}
    teachers = {"teachers": [head(1), head(2)], "route": torch.tensor([1, 0, 1])}
    return {"student": head(B), **teachers, "uncond": uncond, **rest, "eps": 1e-6, "reduction": "mean"}


def lora():
    adapters = k.pack_adapters([(randn(r, C), randn(P, r)) for r in (2, 4)])
    return {"x": randn(B, N, C), "weight": randn(P, C), "bias": randn(P), "adapters": adapters,
            "route": torch.tensor([0, -1, 1]), "scale": None, "weight_scale": None}  # fmt: skip


def step(*names):
    levels = {"sigma": torch.ones(B), "next_sigma": torch.full((B,), 0.5)}
    made = {name: randn(B, N, C) for name in ("z", *names)} | levels
    made["active"] = torch.tensor([True, False, True])
    return made | ({"guidance_scale": torch.ones(B)} if "uncond" in names else {})


def sde():
    return step("velocity", "noise") | {"sigmas": torch.linspace(1, 0, 5), "noise_level": 0.7}


def codes():
    weight, weight_scale = k.fp8_quantize_rowwise(randn(P, C))
    return {"x": randn(B, C), "weight": weight, "weight_scale": weight_scale, "bias": randn(P), "x_scale": None,
            "out_dtype": torch.float32, "weight_only": False}  # fmt: skip


def modulated():
    per_sample = {name: randn(B, C) for name in ("shift", "scale", "gate")}
    return {"x": randn(B, N, C), "residual": randn(B, N, C), **per_sample, "eps": 1e-6}


ALL = ("torch", "cpu", "triton")
OPERATIONS = [
    Operation("routed_velocity_mse", k.routed_velocity_mse, routed, ALL),
    Operation("fused_output_head_mse", k.fused_output_head_mse, heads, ("torch", "triton")),
    Operation("routed_lora_linear", k.routed_lora_linear, lora, ("torch", "triton")),
    Operation("pack_adapters", lambda adapters, scale, backend: k.pack_adapters(adapters, scale),
              lambda: {"adapters": [(randn(2, C), randn(P, 2))], "scale": [1.0]}, ("torch",)),
    Operation("euler_step_", k.euler_step_, lambda: step("velocity", "uncond"), ALL),
    Operation("heun_step_", k.heun_step_, lambda: step("first", "second", "uncond", "second_uncond"), ALL),
    Operation("sde_step_", k.sde_step_, sde, ALL),
    Operation("fp8_quantize_rowwise", k.fp8_quantize_rowwise, lambda: {
        "x": randn(B, N, C), "norm": True, "scale": randn(B, C), "shift": randn(B, C), "eps": 1e-6}, ALL),
    Operation("fp8_linear", k.fp8_linear, codes, ("torch", "triton")),
    Operation("adaln_modulate", k.adaln_modulate, modulated, ("torch", "triton")),
]  # fmt: skip
BY_BACKEND = [pytest.param(o, b, id=f"{o.name}-{b}") for o in OPERATIONS for b in o.backends]


def run(operation, backend, arguments):
    with torch.no_grad():
        return operation.call(**arguments, backend=backend)


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
    run(operation, backend, operation.arguments())
    for name, value in operation.arguments().items():
        for junk in wrong_everywhere():
            # What the others are compared with may be the odd one by its shape alone: then they are named.
            odd = isinstance(junk, torch.Tensor) and junk.dtype == torch.float32
            with pytest.raises(ValueError, match=r"\w+ \w+" if odd else name.removesuffix("s").replace("_", "[_ ]")):
                run(operation, backend, operation.arguments() | {name: junk})
        if isinstance(value, k.Head):
            for part in value._fields:
                for junk in (None, *wrong_everywhere()):
                    with pytest.raises(ValueError, match=f"{name}.*: {part} must be"):
                        run(operation, backend, operation.arguments() | {name: value._replace(**{part: junk})})
            with pytest.raises(ValueError, match=f"{name} must be a Head"):
                run(operation, backend, operation.arguments() | {name: tuple(value)})


@pytest.mark.parametrize(("operation", "backend"), BY_BACKEND)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_argument_ends_the_process(operation, backend, data):
    """One to three arguments are replaced: the operation runs, or says what does not fit."""
    if backend == "cpu" and k.compiled.module("cpu") is None:
        pytest.skip("the cpu module was not built")
    arguments = operation.arguments()
    changed = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=3, unique=True))
    arguments |= {name: copy.copy(data.draw(maybe_wrong(), label=name)) for name in changed}
    with torch.set_grad_enabled(data.draw(st.booleans(), label="gradients are recorded")), suppress(ValueError):
        operation.call(**arguments, backend=backend)
