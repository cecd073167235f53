"""Operation 3 against float64, and its Triton path against autograd of the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import here

pytest.importorskip("danceopd_kernels")

from danceopd_kernels import fp8_linear, fp8_quantize_rowwise
from danceopd_kernels.lora import lora_linear, pack_adapters, routed_lora_linear

pytestmark = pytest.mark.usefixtures("device")

# Triton's interpreter rounds to bfloat16 towards zero, at twice the error.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def case(ranks, tokens=20, width=24, out=40, samples=4, dtype=torch.float32, seed=0, device=None):
    """x, weight, bias, adapters that require gradients, route, scale; in the way the operation takes them."""
    device = device or here()
    torch.manual_seed(seed)
    make = lambda *shape: torch.randn(*shape).to(device, dtype)  # noqa: E731
    x = make(samples, tokens, width).requires_grad_()
    adapters = [((make(r, width) / width**0.5).requires_grad_(), make(out, r).requires_grad_()) for r in ranks]
    route = torch.randint(-1, len(ranks), (samples,)).to(device)
    return x, make(out, width) / width**0.5, make(out), adapters, route, [0.5 + i for i in range(len(ranks))]


def plain(x, weight, bias, adapters, route, scale):
    """The operation sample by sample in float64."""
    rows = []
    for sample, m in zip(x.double(), route.tolist(), strict=True):
        y = sample @ weight.double().T + (0 if bias is None else bias.double())
        if m >= 0:
            a, b = adapters[m]
            y = y + scale[m] * (sample @ a.double().T) @ b.double().T
        rows.append(y)
    return torch.stack(rows)


def leaves(x, adapters):
    return [x, *(factor for pair in adapters for factor in pair)]


def gradients(y, tensors, upstream):
    grads = torch.autograd.grad(y, tensors, upstream.to(y.dtype), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True)]


def error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def compare(problem, backend):
    """Output and every gradient against float64; the largest relative error."""
    x, _, _, adapters, *_ = problem
    upstream = torch.randn(*x.shape[:-1], len(problem[1]), device=x.device)
    y, want = routed_lora_linear(*problem, backend=backend), plain(*problem)
    pairs = [(y, want)]
    pairs += zip(
        gradients(y, leaves(x, adapters), upstream), gradients(want, leaves(x, adapters), upstream), strict=True
    )
    assert all(got.dtype == x.dtype for got, _ in pairs)
    return max(error(got, wanted) for got, wanted in pairs)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", BOUND)
def test_against_float64(dtype, backend):
    """Ranks below, at and above a block, tokens and widths that are no multiples of one, samples without adapter."""
    problem = case([3, 16, 70], tokens=67, width=65, out=71, dtype=dtype)
    problem[4].copy_(torch.tensor([2, -1, 0, 2]))
    assert compare(problem, backend) < BOUND[dtype]


@pytest.mark.parametrize("tokens", [1, 20, 400])  # of few, the adapter's products; of many, with the weight's sum
@pytest.mark.parametrize("route", [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0], [0, -1, 1, 1]])
@pytest.mark.parametrize(("ranks", "scale"), [([8, 8], 0.5), ([8, 8], [0.5, 2.0]), ([0, 8], 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_host_without_gradient(tokens, route, ranks, scale, dtype):
    x, weight, bias, adapters, *_ = case(ranks, tokens=tokens, dtype=dtype, device="cpu")
    each = scale if isinstance(scale, list) else [scale] * 2
    for added in (bias, None):
        with torch.no_grad():
            got = routed_lora_linear(x, weight, added, adapters, torch.tensor(route), scale, backend="torch")
            want = plain(x, weight, added, adapters, torch.tensor(route), each)
        assert got.dtype == dtype
        assert error(got, want) < BOUND[dtype]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("dtype", "of_adapter"), [("float32", "float32"), ("bfloat16", "float32")])
@pytest.mark.parametrize("tokens", [3, 400])  # the second: the adapter is added to the weight
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_adapter_for_all_rows(gradient, dtype, of_adapter, tokens, backend, monkeypatch):
    if backend == "triton" and tokens > 3 and here() == "cpu":
        pytest.skip("the interpreter is slow")
    x, weight, bias, [(a, b)], _, _ = case((4,), tokens, dtype=getattr(torch, dtype))
    a, b = (t.detach().to(getattr(torch, of_adapter)).requires_grad_() for t in (a, b))
    monkeypatch.setenv("DANCEOPD_KERNELS", backend)
    with torch.set_grad_enabled(gradient):
        got = lora_linear(x, weight, bias, a, b, 0.7)
        want = plain(x, weight, bias, [(a, b)], torch.zeros(len(x), dtype=torch.int64), [0.7])
    limit = 1e-5 if dtype == "float32" else 2e-2
    assert got.shape == want.shape
    assert got.dtype == x.dtype
    assert error(got, want) < limit
    if gradient:
        upstream = torch.randn(got.shape, device=here())
        for mine, exact in zip(*(gradients(y, (x, a, b), upstream) for y in (got, want)), strict=True):
            assert error(mine, exact) < limit


@settings(max_examples=10)
@given(
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any),
    tokens=st.integers(1, 70),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    samples=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_shape(ranks, tokens, width, out, samples, seed):
    assert compare(case(ranks, tokens, width, out, samples, seed=seed), "triton") < BOUND[torch.float32]


@pytest.mark.parametrize("mode", ["forward alone", "one route", "routes"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", BOUND)
def test_a_weight_in_codes_has_adapters_that_are_not(dtype, backend, mode):
    """The base's part is fp8_linear's; what the adapter adds, and every gradient, is as exact as without codes."""
    x, weight, bias, adapters, route, scale = case([3, 16], tokens=33, width=64, out=48, dtype=dtype)
    codes, weight_scale = fp8_quantize_rowwise(weight)
    route.copy_(torch.tensor([1, 1, 1, 1] if mode == "one route" else [1, -1, 0, 1]))
    with torch.no_grad():
        base = fp8_linear(x, codes, weight_scale, bias)
    nothing = torch.zeros_like(weight)
    with torch.set_grad_enabled(mode != "forward alone"):
        y = routed_lora_linear(x, codes, bias, adapters, route, scale, weight_scale=weight_scale, backend=backend)
    added = plain(x, nothing, None, adapters, route, scale)
    assert error(y, base.double() + added) < BOUND[dtype]
    if mode != "forward alone":
        upstream = torch.randn(*y.shape, device=x.device).to(dtype)
        want = plain(x, codes.double() * weight_scale, None, adapters, route, scale)
        tensors = leaves(x, adapters)
        for got, wanted in zip(gradients(y, tensors, upstream), gradients(want, tensors, upstream), strict=True):
            assert error(got, wanted) < BOUND[dtype]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_sample_and_empty_routes(backend):
    """Adapters that no sample is routed to get gradients of exactly zero."""
    problem = case([4] * 8, samples=1)
    problem[4].fill_(5)
    x, adapters = problem[0], problem[3]
    assert compare(problem, backend) < BOUND[torch.float32]
    grads = gradients(
        routed_lora_linear(*problem, backend=backend), leaves(x, adapters), torch.ones(1, 20, 40, device=here())
    )
    assert [bool(g.any()) for g in grads[1:]] == [i // 2 == 5 for i in range(16)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_adapter_is_the_base_alone(backend):
    x, weight, bias, adapters, route, scale = case([4, 8])
    y = routed_lora_linear(x, weight, bias, adapters, torch.full_like(route, -1), scale, backend=backend)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_dimensions_and_no_bias(backend):
    x, weight, _, adapters, route, scale = case([4, 8], tokens=1)
    got = routed_lora_linear(x[:, 0], weight, None, adapters, route, scale, backend=backend)
    assert got.shape == (4, 40)
    assert error(got, plain(x, weight, None, adapters, route, scale)[:, 0]) < BOUND[torch.float32]


def test_float32_adapters_under_bfloat16():
    """Master weights of an optimiser: their gradients come back in float32."""
    x, weight, bias, adapters, route, scale = case([4, 8], dtype=torch.bfloat16)
    adapters = [(a.detach().float().requires_grad_(), b.detach().float().requires_grad_()) for a, b in adapters]
    results = []
    for backend in ("torch", "triton"):
        y = routed_lora_linear(x, weight, bias, adapters, route, scale, backend=backend)
        results.append([y, *gradients(y, leaves(x, adapters), torch.ones_like(y))])
    assert [t.dtype for t in results[1]] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert max(error(got, want) for got, want in zip(*reversed(results), strict=True)) < BOUND[torch.bfloat16]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_inf_and_nan_stay_in_their_token(value, backend):
    """Nor do they reach the gradients of adapters of other routes."""
    x, weight, bias, adapters, _, scale = case([3, 20])
    route = torch.tensor([0, 1, -1, 0], device=here())
    x = x.detach().clone()
    x[1, 7, 5] = value
    y = routed_lora_linear(x, weight, bias, adapters, route, scale, backend=backend)
    touched = ~y.isfinite().all(-1)
    assert touched.nonzero().tolist() == [[1, 7]]
    assert torch.equal(y.isnan()[1, 7], plain(x, weight, bias, adapters, route, scale).isnan()[1, 7])
    grads = torch.autograd.grad(y, leaves(x, adapters)[1:], torch.ones_like(y))
    assert [bool(g.isfinite().all()) for g in grads] == [True, True, False, False]


@pytest.mark.parametrize("where", ["a", "b"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_broken_adapter_reaches_its_own_samples_only(where, backend):
    x, weight, bias, adapters, _, scale = case([3, 20])
    route = torch.tensor([0, 1, -1, 0], device=here())
    with torch.no_grad():
        adapters[1][where == "b"].fill_(float("nan"))
    y = routed_lora_linear(x, weight, bias, adapters, route, scale, backend=backend)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    for tensor in (y, grad):
        assert tensor.isfinite().flatten(1).all(1).tolist() == [True, False, True, True]


def test_definition_by_gradcheck():
    x, weight, bias, adapters, _, scale = case([2, 3], tokens=2, width=3, out=4, samples=3, dtype=torch.float64)
    route = torch.tensor([1, -1, 0], device=here())

    def call(x, *factors):
        return routed_lora_linear(x, weight, bias, list(zip(factors[::2], factors[1::2], strict=True)), route, scale)

    assert torch.autograd.gradcheck(call, leaves(x, adapters))


def test_packed_once_and_trained():
    """A trainer's one pack of all adapters: the same result, gradients of the buffers."""
    x, weight, bias, adapters, route, scale = case([3, 8])
    packed = pack_adapters([(a.detach(), b.detach()) for a, b in adapters], scale)
    packed.a.requires_grad_()
    packed.b.requires_grad_()
    y = routed_lora_linear(x, weight, bias, packed, route, backend="triton")
    other = routed_lora_linear(x, weight, bias, adapters, route, scale, backend="triton")
    assert torch.equal(y, other)
    y.sum().backward()
    other.sum().backward()
    assert torch.equal(packed.a.grad, torch.cat([a.grad for a, _ in adapters]))
    assert torch.equal(packed.b.grad, torch.cat([b.grad.T for _, b in adapters]))


def test_only_what_needs_a_gradient():
    x, weight, bias, adapters, route, scale = case([3, 8])
    frozen = [(a.detach(), b.detach()) for a, b in adapters]
    y = routed_lora_linear(x, weight, bias, frozen, route, scale, backend="triton")
    (alone,) = torch.autograd.grad(y.sum(), x)
    y = routed_lora_linear(x, weight, bias, adapters, route, scale, backend="triton")
    assert torch.equal(alone, torch.autograd.grad(y.sum(), x)[0])
    y = routed_lora_linear(x.detach(), weight, bias, adapters, route, scale, backend="triton")
    assert len(torch.autograd.grad(y.sum(), leaves(x, adapters)[1:])) == 4


def test_scale_as_number_tensor_or_none():
    x, weight, bias, adapters, route, _ = case([3, 8])
    of = lambda scale: routed_lora_linear(x, weight, bias, adapters, route, scale, backend="triton")  # noqa: E731
    assert torch.equal(of(None), of(1))
    assert torch.equal(of(2.0), of(torch.tensor([2.0, 2.0], device=here())))


def changed(**new):
    values = dict(zip(("x", "weight", "bias", "adapters", "route", "scale"), case([3, 8], device="cpu"), strict=True))
    return values | {name: change(values[name]) for name, change in new.items()}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"x": lambda x: x[0, 0]}, r"x must be \[B, N, in\]"),
        ({"x": lambda x: x[:0]}, "not empty"),
        ({"weight": lambda w: w[:, 1:]}, "weight must be"),
        ({"weight": lambda w: w.double()}, "weight must be float32"),
        ({"bias": lambda b: b[1:]}, "bias must be"),
        ({"bias": lambda b: b.half()}, "bias must be float32"),
        ({"adapters": lambda _: [], "scale": lambda _: None}, "no adapter"),
        ({"adapters": lambda p: [p[0], (p[1][0], p[1][1][:, 1:])]}, "adapter 1: B must be"),
        ({"adapters": lambda p: [p[0], (p[1][0].double(), p[1][1])]}, "adapter 1: A must be float32"),
        ({"adapters": lambda p: [(a.double(), b.double()) for a, b in p]}, "adapters' A must be"),
        ({"adapters": lambda p: [(a[:, 1:], b) for a, b in p]}, "adapters' A must be"),
        ({"route": lambda r: r[1:]}, "route must be int64"),
        ({"route": lambda r: r.int()}, "route must be int64"),
        ({"route": lambda r: r + 2}, "route must name one of 2"),
        ({"route": lambda r: r - 2}, "route must name one of 2"),
        ({"scale": lambda s: s[1:]}, "scale must be"),
        ({"adapters": pack_adapters}, "packed adapters hold their scale"),
    ],
)
def test_bad_input(new, message):
    with pytest.raises(ValueError, match=message):
        routed_lora_linear(**changed(**new))


def test_a_backend_that_cannot_run():
    with pytest.raises(ValueError, match="cannot run"):
        routed_lora_linear(**changed(), backend="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", BOUND)
def test_on_the_device(dtype):
    assert compare(case([4, 16, 64, 130], tokens=1000, width=3072, out=1024, dtype=dtype), "triton") < BOUND[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_in_a_graph():
    """A captured forward and backward follows a route that changed in place, to the same bits."""
    problem = case([4, 16, 64], tokens=256, width=512, out=512, dtype=torch.bfloat16)
    x, adapters, route = problem[0], problem[3], problem[4]

    def step():
        y = routed_lora_linear(*problem, backend="triton")
        return [y, *torch.autograd.grad(y.sum(), leaves(x, adapters))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for routes in ([0, 1, 2, -1], [2, 2, 2, 2]):
        route.copy_(torch.tensor(routes))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
