"""Operation 1 against sums of float64, on every backend."""

import math
import sys

import pytest
import torch
from danceopd_kernels import compiled, routed_velocity_mse
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = {  # of the loss, of the gradient
    torch.float64: (1e-13, 1e-13),
    torch.float32: (2e-6, 2e-6),
    torch.bfloat16: (2e-6, 8e-3),  # Triton's interpreter cuts bf16 off instead of rounding
    torch.float16: (2e-6, 6e-4),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(shape, route, teachers, dtype=torch.float32, *, guided=False, weighted=False, masked=0, seed=0):
    """Inputs, a list of teachers; masked: how many dimensions of the mask."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    route = torch.tensor(route)
    counts = [(route == m).sum().item() for m in range(teachers)]
    made = {"student": randn(len(route), *shape), "teachers": [randn(n, *shape) for n in counts], "route": route}
    if guided:
        made |= {
            "uncond": [randn(n, *shape) for n in counts],
            "guidance_scale": 6 * torch.rand(len(route), generator=generator),
        }
    if weighted:
        made["weight"] = torch.rand(len(route), generator=generator) + 0.5
    if masked:
        made["mask"] = torch.rand(len(route), *shape[: masked - 1], generator=generator) > 0.4
        made["mask"][:, 0] = True  # something is left of each sample
    return made


def expected(student, teachers, route, row=None, uncond=None, uncond_row=None, guidance_scale=None, weight=None,
             mask=None):  # fmt: skip
    """One sample at a time in float64: losses, gradients, errors, norms of velocity and of target.

    A list holds each teacher's samples in order where there is no row; a tensor is in the samples' order.
    """
    seen, found = {}, []
    for i, m in enumerate(route.tolist()):
        k = seen[m] = seen.get(m, -1) + 1

        def pick(tensors, rows, k=k, m=m, i=i):
            if isinstance(tensors, list):
                return tensors[m][k if rows is None else rows[i]].double()
            return tensors[i if rows is None else rows[i]].double()

        target, velocity = pick(teachers, row), student[i].double()
        if uncond is not None:
            rows = row if uncond_row is None and isinstance(uncond, list) else uncond_row
            base = pick(uncond, rows)
            target = base + guidance_scale[i].double() * (target - base)
        count = velocity.numel()
        if mask is not None:
            wide = mask[i].view(*mask[i].shape, *(1,) * (velocity.dim() - mask[i].dim())).expand_as(velocity)
            target, velocity, count = torch.where(wide, target, 0.0), torch.where(wide, velocity, 0.0), wide.sum()
        w = 1.0 if weight is None else weight[i].double()
        error = velocity - target
        mse = error.square().sum() / count
        found.append((w * mse, 2 * w * error / count, mse, velocity.norm(), target.norm()))
    return [torch.stack(values) for values in zip(*found, strict=True)]


def moved(values, device):
    return {
        k: [t.to(device) for t in v] if isinstance(v, list) else v.to(device) if torch.is_tensor(v) else v
        for k, v in values.items()
    }


def check(made, place):
    backend, device = place
    dtype = made["student"].dtype
    loss_tolerance, gradient_tolerance = TOLERANCE[dtype]
    losses, gradients, *watched = expected(**made)
    for reduction in ("none", "mean"):
        for norms in (False, True):
            here = moved(made, device)
            student = here.pop("student").requires_grad_()
            given = routed_velocity_mse(student, **here, reduction=reduction, norms=norms, backend=backend)
            loss = given.loss if norms else given
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
            wanted, share = (losses, 1) if reduction == "none" else (losses.mean(), len(losses))
            torch.testing.assert_close(loss.double().cpu(), wanted, rtol=loss_tolerance * 4, atol=1e-7)
            for got, value in zip(given[1:] if norms else (), watched, strict=norms):
                assert not got.requires_grad
                torch.testing.assert_close(got.double().cpu(), value, rtol=loss_tolerance * 4, atol=1e-7)
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert gradient.dtype == dtype
            scale = gradients.abs().max() / share
            worst = (gradient.double().cpu() - gradients / share).abs().max().item()
            assert worst <= gradient_tolerance * scale.item() + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"guided": True}, {"masked": 2}, {"guided": True, "weighted": True, "masked": 3}],
    ids=["plain", "guided", "masked", "all"],
)
def test_agrees_with_float64(place, dtype, options):
    check(problem((3, 7, 11), [2, 0, 2, 2, 0], 3, dtype, **options), place)


@pytest.mark.parametrize(
    ("shape", "route", "teachers"),
    [
        ((1,), [0], 1),  # one number
        ((64, 33), [0], 1),  # one sample of packed tokens
        ((5, 3), [7, 0, 3, 3, 1, 6, 5, 2, 4], 8),
        ((4, 16, 70), [1, 1], 4),  # empty routes; more than one block of Triton's
        ((3, 50, 60), [1, 0, 1], 2),  # more than one chunk of the compiled kernels
    ],
)
def test_shapes_and_routes(place, shape, route, teachers):
    check(problem(shape, route, teachers, guided=True, weighted=True), place)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shape_and_route(place, data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    teachers = data.draw(st.integers(1, 8))
    route = data.draw(st.lists(st.integers(0, teachers - 1), min_size=1, max_size=6))
    options = {
        "guided": data.draw(st.booleans()),
        "weighted": data.draw(st.booleans()),
        "masked": data.draw(st.integers(2, len(shape) + 1)) if data.draw(st.booleans()) else 0,
    }
    dtype = data.draw(st.sampled_from((*DTYPES, torch.float64) if place[0] == "torch" else DTYPES))
    check(problem(shape, route, teachers, dtype, **options), place)


@settings(max_examples=500)
@given(st.integers(2, 2**31 - 1) | st.integers(2, 100), st.integers(0, 2**31 - 1), st.integers(-1, 1))
def test_a_product_divides_as_a_division(divisor, x, beside):
    """Also beside multiples, where the quotient changes."""
    multiplier, shift = sys.modules["danceopd_kernels.routed_velocity_mse"].division(divisor)
    assert -(2**31) <= multiplier < 0  # of 32 bits
    for value in (x, max(0, x // divisor * divisor + beside)):
        assert (value * (multiplier + 2**32) >> 32) >> shift == value // divisor


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_rows_of_a_larger_set_of_answers(place, data):
    """Micro-batches of one set, whose tensors hold rows with a prompt and without; some samples are not guided."""
    seed, shape = data.draw(st.integers(0, 99)), data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from((*DTYPES, torch.float64) if place[0] == "torch" else DTYPES))
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
    generator = torch.Generator().manual_seed(seed)
    answers = [torch.randn(n, *shape, generator=generator).to(dtype) for n in sizes]
    samples = data.draw(st.integers(1, 5))
    held = [m for m, n in enumerate(sizes) if n]
    route = data.draw(st.lists(st.sampled_from(held), min_size=samples, max_size=samples))
    rows = [[data.draw(st.integers(0, sizes[m] - 1)) for m in route] for _ in range(2)]
    row, own = (torch.tensor(r) for r in rows)
    scale = torch.rand(samples, generator=generator) * 6
    plain = torch.rand(samples, generator=generator) > 0.5
    made = {
        "student": torch.randn(samples, *shape, generator=generator).to(dtype),
        "teachers": answers,
        "route": torch.tensor(route),
        "row": row,
        "weight": torch.rand(samples, generator=generator),
    }
    guided = {"uncond": answers, "guidance_scale": scale.where(~plain, 1.0)}
    check(made, place)
    check(made | guided, place)  # uncond in the same rows
    check(made | guided | {"uncond_row": own.where(~plain, row)}, place)
    packed, at = torch.cat(answers), torch.tensor([sum(sizes[:m]) for m in route])
    one = guided | {"uncond": packed, "uncond_row": (own + at).where(~plain, row + at)}
    check(made | one, place)  # the unconditional rows in one tensor
    here = moved(made | one | {"teachers": packed, "row": row + at, "reduction": "none"}, place[1])
    lists = moved(made | guided | {"uncond_row": own.where(~plain, row), "reduction": "none"}, place[1])
    results = [
        routed_velocity_mse(**{**h, "route": r}, backend=place[0]) for h, r in ((here, None), (lists, lists["route"]))
    ]
    assert torch.equal(*results)


def test_unconditional_velocities_in_the_order_of_the_samples(place):
    made = problem((3, 5), [1, 0, 1, 0], 2, guided=True)
    check(made | {"uncond": torch.randn(4, 3, 5)}, place)


def test_a_sample_that_is_not_guided_has_exactly_its_row_as_target(place):
    backend, device = place
    answers = torch.randn(3, 700, device=device)
    row = torch.tensor([2, 0], device=device)
    guided = {"uncond": answers, "uncond_row": row, "guidance_scale": 1.0}
    matched = routed_velocity_mse(answers[row], answers, row=row, **guided, norms=True, backend=backend)
    assert matched.error.eq(0).all()
    assert matched.loss == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_scales_of_half_precision_and_of_any_size(place, dtype):
    made = problem((4, 16, 16), [0, 1, 0, 1], 2, dtype, guided=True)
    made |= {"guidance_scale": torch.tensor([0.5, 1.0, 7.5, 40.0]).to(dtype)}
    made |= {"weight": torch.tensor([1e-3, 1.0, 300.0, 30_000.0]).to(dtype)}
    check(made, place)
    made["mask"] = torch.zeros(4, 4, 16, dtype=torch.bool)
    made["mask"][:, 0, 5] = True
    made["weight"] = made["weight"] / 100  # the gradients of 16 entries still fit in float16
    check(made, place)


@pytest.mark.parametrize("wrong", [{"row": [0, 2]}, {"row": [-1, 0]}, {"route": [0, 2]}, {"route": [-1, 0]},
                                   {"uncond_row": [3, 0]}, {"uncond_row": [0, -9]}], ids=str)  # fmt: skip
def test_a_row_that_is_not_there_is_refused_or_not_read(place, wrong, monkeypatch):
    backend, device = place
    made = {"route": [0, 1], "row": [1, 1], "uncond_row": [2, 0]} | wrong
    made = {name: torch.tensor(value, device=device) for name, value in made.items()}
    teachers = [torch.ones(2, 300, device=device), torch.ones(2, 300, device=device)]
    made |= {"uncond": [torch.ones(3, 300, device=device)] * 2, "guidance_scale": 2.0, "reduction": "none"}
    student = torch.ones(2, 300, device=device, requires_grad=True)
    if device == "cpu":
        with pytest.raises(ValueError, match=next(iter(wrong))):
            routed_velocity_mse(student, teachers, **made, backend=backend)
    if backend in ("torch", "cpu"):
        return
    monkeypatch.setattr(sys.modules["danceopd_kernels.routed_velocity_mse"], "_check_rows", lambda *_: None)
    matched = routed_velocity_mse(student, teachers, **made, norms=True, backend=backend)
    matched.loss.sum().backward()
    (bad,) = [i for i, x in enumerate(next(iter(wrong.values()))) if x not in (0, 1)]
    for value in (matched.loss, matched.error, matched.target_norm, student.grad.sum(1)):
        assert value.isnan().nonzero().tolist() == [[bad]]


def test_one_buffer_packed_or_in_the_order_of_the_samples(place):
    backend, device = place
    made = moved(problem((3, 5), [1, 0, 1, 0], 2, guided=True), device)
    lists = routed_velocity_mse(**made, backend=backend)
    packed = {**made, "teachers": torch.cat(made["teachers"]), "uncond": torch.cat(made["uncond"])}
    assert torch.equal(routed_velocity_mse(**packed, backend=backend), lists)
    order = made["route"].argsort(stable=True).argsort()
    unpacked = {**packed, "teachers": packed["teachers"][order], "uncond": packed["uncond"][order], "route": None}
    assert torch.equal(routed_velocity_mse(**unpacked, backend=backend), lists)


def test_what_is_masked_does_not_count_even_if_it_is_nan(place):
    backend, device = place
    made = problem((4, 6), [0, 0, 0], 1)
    made["mask"] = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    clean = [value.nan_to_num() for value in expected(**made)[:2]]  # of the last sample nothing counts: 0
    made["student"][0, 2:], made["teachers"][0][0, 3], made["student"][2] = math.nan, math.inf, math.nan
    here = moved(made, device)
    student = here.pop("student").requires_grad_()
    loss = routed_velocity_mse(student, **here, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss.double().cpu(), clean[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double().cpu(), clean[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # of which one is scaled in place
def test_gradients_of_any_upstream(place, dtype):
    backend, device = place
    made = problem((3, 5), [1, 0, 1], 2, dtype, weighted=True)
    gradients = expected(**made)[1]
    here = moved(made, device)
    student = here.pop("student").requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.0])
    loss = routed_velocity_mse(student, **here, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, upstream.to(device))
    wanted, near = gradients * upstream.double().view(3, 1, 1), 1e-5 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(gradient.double().cpu(), wanted, rtol=near, atol=near / 10)


def test_a_scaled_loss_keeps_small_gradients_in_fp16(place):
    """As torch.amp.GradScaler does: the scale must reach the gradient before fp16 rounds it away."""
    backend, device = place
    made = problem((16, 64, 64), [0, 0, 0, 0], 1, torch.float16)
    made["teachers"] = [made["student"] + 0.01 * made["teachers"][0]]
    gradients = expected(**made)[1]
    here = moved(made, device)
    student = here.pop("student").requires_grad_()
    (gradient,) = torch.autograd.grad(2.0**20 * routed_velocity_mse(student, **here, backend=backend), student)
    torch.testing.assert_close(gradient.double().cpu(), 2.0**18 * gradients, rtol=2e-3, atol=1e-6)


def test_a_second_backward_is_refused_or_right(place):
    backend, device = place
    made = moved(problem((3, 5), [1, 0, 1], 2), device)
    student = made.pop("student").requires_grad_()
    loss = 3 * routed_velocity_mse(student, **made, backend=backend)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    first = first.clone()
    if backend == "torch":
        assert torch.equal(torch.autograd.grad(loss, student, retain_graph=True)[0], first)
    else:
        with pytest.raises(RuntimeError, match="inplace"):
            torch.autograd.grad(loss, student, retain_graph=True)


def test_the_definition_passes_gradcheck():
    made = problem((2, 3), [1, 0, 1], 2, torch.float64, guided=True, weighted=True, masked=2)
    student = made.pop("student").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: routed_velocity_mse(x, **made, reduction="none"), student)


def test_under_torch_compile_without_a_break(place):
    backend, device = place
    if backend == "triton" and device == "cpu":
        pytest.skip("an interpreted kernel cannot be compiled")
    made = moved(problem((3, 5), [1, 0, 1], 2, guided=True), device)
    student = made.pop("student").requires_grad_()

    def loss(student):
        return routed_velocity_mse(2 * student, **made, norms=True, backend=backend).loss

    (wanted,) = torch.autograd.grad(loss(student), student)
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled_loss(student), student)
    torch.testing.assert_close(got, wanted)


def test_the_operator_is_well_formed():
    made = problem((3, 5), [1, 0, 1], 2)
    student = made["student"].requires_grad_()
    row = torch.tensor([0, 0, 1])
    args = (student, made["teachers"], made["route"], row, [], None, None, None, None, 1.0, True, "cpu")
    if compiled.module("cpu") is None:
        pytest.skip("the cpu module was not built")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # tracing: by torch.compile above
    torch.library.opcheck(torch.ops.danceopd_kernels.routed_velocity_mse.default, args, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": [torch.zeros(1, 3, 5)] * 2}, r"hold \[1, 1\] samples, the student 3"),
        ({"teachers": [torch.zeros(2, 3, 5), torch.zeros(1, 3, 5)]}, "row of sample"),
        ({"teachers": [torch.zeros(1, 3, 5), torch.zeros(2, 3, 4)]}, r"teachers must be .*\[rows, 3, 5\]"),
        ({"teachers": [torch.zeros(1, 3, 5), torch.zeros(2, 3, 5).half()]}, "teachers must be float32"),
        ({"teachers": [torch.zeros(0, 3, 5)] * 9}, "1 to 8"),
        ({"route": torch.tensor([1, 0])}, "route must be int64"),
        ({"route": torch.tensor([1.0, 0, 1])}, "route must be int64"),
        ({"route": None}, "needs a route"),
        ({"teachers": torch.zeros(3, 3, 5), "row": torch.tensor([0, 1, 2])}, "a route is for a list"),
        ({"teachers": torch.zeros(3, 3, 5), "route": torch.tensor([0, -1, 2])}, "not be negative"),
        ({"guidance_scale": 2.0}, "needs both"),
        ({"uncond": [torch.zeros(1, 3, 5), torch.zeros(2, 3, 5)]}, "needs both"),
        ({"uncond": [torch.zeros(3, 3, 5)], "guidance_scale": 2.0}, "as many teachers"),
        ({"uncond": [torch.zeros(2, 3, 5), torch.zeros(1, 3, 5)], "guidance_scale": 2.0}, "uncond hold .2, 1"),
        ({"uncond": torch.zeros(2, 3, 5), "guidance_scale": 2.0}, "holds .2. samples"),
        ({"uncond_row": torch.tensor([0, 1, 2])}, "needs uncond"),
        ({"weight": torch.ones(2)}, "weight must be"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, "mask must be"),
        ({"student": torch.zeros(0, 3, 5)}, "no sample"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    made = problem((3, 5), [1, 0, 1], 2)
    with pytest.raises(ValueError, match=message):
        routed_velocity_mse(**made | change)


def test_every_instruction_set():
    module = compiled.module("cpu")
    if module is None:
        pytest.skip("the cpu module was not built")
    made = problem((3, 60, 61), [1, 0, 1], 2, torch.float16, guided=True, weighted=True, masked=3)
    widest = module.instruction_set()
    try:
        for name in {"avx512": ("base", "avx2", "avx512"), "avx2": ("base", "avx2"), "base": ("base",)}[widest]:
            module.use(name)
            for dtype in DTYPES:
                values = [[t.to(dtype) for t in made[k]] for k in ("teachers", "uncond")]
                here = made | {"teachers": values[0], "uncond": values[1], "student": made["student"].to(dtype)}
                check(here, ("cpu", "cpu"))
                check({k: v for k, v in here.items() if k != "mask"}, ("cpu", "cpu"))
    finally:
        module.use(widest)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """Offsets of 64 bits, on the host's kernels: 2^31 + 2^20 elements in bfloat16."""
    samples, elements = 2049, 1 << 20
    student = torch.zeros(samples, elements, dtype=torch.bfloat16)
    teacher = torch.zeros(samples, elements, dtype=torch.bfloat16)
    student[-1, -1] = 2.0
    loss = routed_velocity_mse(student, teacher, reduction="none", backend="cpu")
    assert loss.argmax() == samples - 1
    assert loss[-1] == 4 / elements
    assert loss[:-1].eq(0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_replays_in_a_cuda_graph(backend):
    if backend == "cuda" and compiled.module("cuda") is None:
        pytest.skip("the cuda module was not built")
    made = moved(problem((4, 33), [1, 0, 1], 2, guided=True, weighted=True), "cuda")
    student = made.pop("student").requires_grad_()

    def run():
        loss = routed_velocity_mse(student, **made, backend=backend)
        return loss, torch.autograd.grad(loss, student)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = run()
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
        made["guidance_scale"].mul_(0.5)
    graph.replay()
    wanted = run()
    torch.testing.assert_close(loss, wanted[0])
    torch.testing.assert_close(gradient, wanted[1])
