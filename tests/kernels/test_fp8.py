"""Operation 5: codes bit for bit as torch casts them, the product against torch._scaled_mm and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_device import here

pytest.importorskip("danceopd_kernels")

from danceopd_kernels import compiled, fp8, routed_lora_linear
from danceopd_kernels.fp8 import DTYPES, FLOAT8, fp8_linear, fp8_quantize_rowwise

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value"),  # numpy's, of NaN and infinity in the interpreter
    pytest.mark.usefixtures("device"),
]

BACKENDS = ("torch", "triton")
QUANTIZERS = (*BACKENDS, "cpu") if compiled.module("cpu") else BACKENDS


@triton.jit
def _encode_kernel(values, codes, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + i, fp8._encode(tl.load(values + i, i < n, other=0.0)).to(tl.uint8), i < n)


@triton.jit
def _decode_kernel(codes, values, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(values + i, fp8._decode(tl.load(codes + i)))


def all_codes():
    return torch.arange(256, device=here()).to(torch.uint8)


def bits(codes):
    """Codes to compare: NaN has a sign of no meaning."""
    codes = codes.view(torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0x7F, codes)


def test_encoding_is_torchs_cast():
    """Every fp16 and bf16 number, every e4m3 number and midpoint with both neighbours, and a grid over all float32."""
    finite = all_codes().view(FLOAT8).float()
    finite = finite[finite.isfinite()].sort().values
    edges = torch.cat([finite, (finite[1:] + finite[:-1]) / 2])
    infinity = torch.full_like(edges, float("inf"))
    short = torch.arange(-(2**15), 2**15, device=here()).to(torch.int16)
    grid = torch.arange(-(2**31), 2**31, 40961, device=here()).to(torch.int32).view(torch.float32)
    values = torch.cat(
        [
            edges,
            torch.nextafter(edges, infinity),
            torch.nextafter(edges, -infinity),
            *(short.view(dtype).float() for dtype in (torch.bfloat16, torch.float16)),
            grid,
        ]
    )
    codes = torch.empty(len(values), dtype=torch.uint8, device=here())
    block = 1024 if here() == "cuda" else 2**18
    _encode_kernel[(triton.cdiv(len(values), block),)](values, codes, len(values), BLOCK=block)
    # Some versions of torch cast what is beyond 448 to NaN; the rule here is to stop there.
    assert torch.equal(bits(codes), bits(values.clamp(-448, 448).to(FLOAT8)))


def test_decoding_of_every_code():
    values = torch.empty(256, dtype=torch.float16, device=here())
    _decode_kernel[(1,)](all_codes(), values, BLOCK=256)
    want = all_codes().view(FLOAT8).float()
    torch.testing.assert_close(values.float() * 256, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit(), want.signbit())


@settings(max_examples=10)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=2),
    width=st.integers(1, 300),
    exponent=st.integers(-44, 30),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("backend", QUANTIZERS)
def test_the_same_on_every_backend(backend, shape, width, exponent, dtype, seed):
    """As torch does it on the host, bit for bit."""
    if backend == "triton" and here() == "cpu" and dtype == torch.bfloat16 and exponent < -30:
        return  # Triton's interpreter misreads bf16's subnormals
    torch.manual_seed(seed)
    x = (torch.randn(*shape, width).double() * 10.0**exponent).to(dtype)
    want, want_scale = fp8_quantize_rowwise(x, backend="torch")
    got, got_scale = (t.cpu() for t in fp8_quantize_rowwise(x.to(here()), backend=backend))
    assert got.shape == x.shape
    assert got.dtype == FLOAT8
    assert torch.equal(bits(got), bits(want))
    torch.testing.assert_close(got_scale, want_scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_definition(backend, dtype):
    """Half a step is a sixteenth of a number at most; the largest of a row is met exactly."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 77).to(here(), dtype)
    codes, scale = fp8_quantize_rowwise(x, backend=backend)
    largest = x.float().abs().amax(-1, keepdim=True)
    # Of the host: over a number CUDA multiplies by its inverse, which rounds otherwise.
    assert torch.equal(scale.cpu(), largest.cpu() / 448)
    assert torch.equal(bits(codes.cpu()), bits((x.cpu().float() * (1 / scale.cpu())).clamp(-448, 448).to(FLOAT8)))
    assert codes.float().abs().amax(-1).eq(448).all()
    step = torch.maximum(x.float().abs() / 16, largest / 448 * 2**-10)
    assert ((codes.float() * scale - x.float()).abs() <= step * 1.001).all()


@pytest.mark.parametrize("backend", QUANTIZERS)
def test_rows_of_zeros_nan_infinity_and_the_smallest_numbers(backend):
    x = torch.randn(5, 33, device=here())
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 3] = float("inf")
    x[3] = torch.finfo(torch.float32).smallest_normal / 2**6
    x[4] = torch.finfo(torch.float32).max
    codes, scale = fp8_quantize_rowwise(x, backend=backend)
    back = codes.float() * scale
    assert scale[0] == 1
    assert not codes[0].float().any()
    assert back[1:3].isnan().all()
    assert codes[1].float().isnan().all()
    assert scale[3] == fp8.SMALLEST_SCALE
    torch.testing.assert_close(back[3:], x[3:], rtol=1 / 16, atol=0)


@pytest.mark.parametrize("backend", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_modulation_against_float64(backend, dtype):
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(2, 7, 131)).to(here(), dtype)
    scale, shift = torch.randn(2, 2, 131).to(here(), dtype)
    codes, row_scale = fp8_quantize_rowwise(x, norm=True, scale=scale, shift=shift, backend=backend)
    want = torch.nn.functional.layer_norm(x.double(), (131,), eps=1e-6)
    want = want * (1 + scale.double()[:, None]) + shift.double()[:, None]
    largest = want.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(row_scale.double(), largest / 448, rtol=1e-5, atol=0)
    error = (codes.double() * row_scale - want).abs()
    assert (error <= torch.maximum(want.abs() / 16, largest / 448 * 2**-10) * 1.001).all()
    alone = fp8_quantize_rowwise(x, norm=True, backend=backend)[1]
    assert error.norm() / want.norm() < 0.04
    assert not torch.equal(alone, row_scale)


def layer(rows, width, out, dtype=torch.bfloat16, device=None):
    device = device or here()
    torch.manual_seed(0)
    x = torch.randn(rows, width).to(device, dtype)
    return x, *fp8_quantize_rowwise(torch.randn(out, width).to(device)), torch.randn(out).to(device, dtype)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_gaussians(backend, dtype):
    """Two roundings to 3 bits, 2.6 % each in norm, make 3.7 %."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 512).to(here(), dtype), torch.randn(96, 512).to(here())
    y = fp8_linear(x, *fp8_quantize_rowwise(weight), backend=backend)
    want = x.double() @ weight.double().T
    assert y.dtype == dtype
    assert 0.03 < (y.double() - want).norm() / want.norm() < 0.04


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 16, 16), (5, 130, 33), (130, 70, 140)])
def test_triton_product_against_scaled_mm(rows, width, out, dtype):
    """The same codes and scales: what is left is the order of sums and the last rounding."""
    x, weight, weight_scale, bias = layer(rows, width, out, dtype)
    codes, x_scale = fp8_quantize_rowwise(x)
    for b in (None, bias):
        got = fp8_linear(codes, weight, weight_scale, b, x_scale=x_scale, out_dtype=dtype, backend="triton")
        want = fp8_linear(codes, weight, weight_scale, b, x_scale=x_scale, out_dtype=dtype, backend="torch")
        exact = (codes.double() * x_scale) @ (weight.double() * weight_scale).T + (0 if b is None else b.double())
        last = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps  # the interpreter cuts off for bfloat16
        # On a GPU torch._scaled_mm gives bfloat16, and takes whole blocks of 16 alone.
        rounded = 2 * torch.finfo(torch.bfloat16).eps if here() == "cuda" else last
        for y, bound in ((got, last), (want, rounded)):
            torch.testing.assert_close(y.double(), exact, rtol=bound, atol=bound * float(exact.abs().max()))


def test_codes_or_numbers_give_the_same():
    x, weight, weight_scale, bias = layer(5, 48, 32)
    codes, x_scale = fp8_quantize_rowwise(x)
    want = fp8_linear(x, weight, weight_scale, bias)
    assert torch.equal(fp8_linear(codes, weight, weight_scale, bias, x_scale=x_scale), want)
    folded = fp8_linear(codes.view(1, 5, 48), weight, weight_scale, bias, x_scale=x_scale[None])
    assert torch.equal(folded, want[None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_their_row_of_the_product(backend, value):
    x, weight, weight_scale, bias = layer(4, 48, 32, torch.float32)
    x[2, 7] = value
    y = fp8_linear(x, weight, weight_scale, bias, backend=backend)
    assert y.isnan().all(1).tolist() == [False, False, True, False]
    assert y[[0, 1, 3]].isfinite().all()


def test_definition_of_the_product():
    """What runs where torch._scaled_mm takes no such sizes."""
    x, weight, weight_scale, bias = layer(4, 48, 32, torch.float32)
    codes, x_scale = fp8_quantize_rowwise(x)
    args = (codes, x_scale, weight, weight_scale, bias, torch.float32)
    torch.testing.assert_close(fp8.reference_linear(*args), fp8.run_triton_linear(*args), rtol=1e-5, atol=1e-5)


WEIGHT_ONLY = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # bounds, as of the LoRA's products


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", WEIGHT_ONLY)
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 16, 16), (5, 130, 33), (130, 70, 140)])
def test_weight_only_takes_x_as_it_is(backend, dtype, rows, width, out):
    if backend == "triton" and dtype == torch.float32:
        pytest.skip("float32 is multiplied by torch")
    x, weight, weight_scale, bias = layer(rows, width, out, dtype)
    for b in (None, bias):
        y = fp8_linear(x, weight, weight_scale, b, weight_only=True, backend=backend)
        exact = x.double() @ (weight.double() * weight_scale).T + (0 if b is None else b.double())
        assert y.dtype == dtype
        assert (y.double() - exact).norm() < WEIGHT_ONLY[dtype] * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_only_of_every_code(backend):
    """The weight's rows are all codes but NaN: what comes out is what they stand for."""
    codes = all_codes()[all_codes() & 0x7F != 0x7F].view(FLOAT8)[:, None]
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=here())
    y = fp8_linear(one, codes, torch.ones(len(codes), 1, device=here()), weight_only=True, backend=backend)
    assert torch.equal(y[0].float(), codes[:, 0].float())


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_x_is_that_of_the_weights_numbers(weight_only, dtype):
    x, weight, weight_scale, bias = layer(12, 48, 32, dtype)
    x = x.view(3, 4, 48).requires_grad_()
    y = fp8_linear(x, weight, weight_scale, bias, weight_only=weight_only)
    upstream = torch.randn(3, 4, 32, device=here()).to(dtype)
    (got,) = torch.autograd.grad(y, x, upstream)
    want = upstream.double() @ (weight.double() * weight_scale)
    assert got.dtype == dtype
    assert (got.double() - want).norm() < WEIGHT_ONLY[dtype] * want.norm()
    with torch.no_grad():
        assert torch.equal(fp8_linear(x, weight, weight_scale, bias, weight_only=weight_only), y)


def test_shapes_without_values():
    x, weight, weight_scale, bias = (t.to("meta") for t in layer(4, 48, 32, device="cpu"))
    assert fp8_quantize_rowwise(x)[1].shape == (4, 1)
    for weight_only in (None, True):
        y = fp8_linear(x.requires_grad_(), weight, weight_scale, bias, weight_only=weight_only)
        assert (y.shape, y.dtype, y.device.type) == ((4, 32), x.dtype, "meta")
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


X = torch.zeros(2, 3, 16)
M = torch.zeros(2, 16)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (X.double(), {}, "x must be"),
        (X[:0], {}, "not empty"),
        (X, {"scale": M}, "a scale needs a shift"),
        (X[0], {"scale": M, "shift": M}, r"x must be \[B, N, C\]"),
        (X, {"scale": M[:1], "shift": M}, "scale must be"),
        (X, {"scale": M, "shift": M.half()}, "shift must be"),
        (X, {"backend": "cuda"}, "cannot run"),
        (X.clone().requires_grad_(), {}, "no gradient passes here, but x"),
    ],
)
def test_bad_rows(x, options, message):
    with pytest.raises(ValueError, match=message):
        fp8_quantize_rowwise(x, **options)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"weight": torch.zeros(32, 48)}, "weight must be"),
        ({"x": torch.zeros(4, 47)}, "x must be"),
        ({"x": torch.zeros(4, 48).double()}, "x must be"),
        ({"x": torch.zeros(4, 48).to(FLOAT8)}, "x_scale goes with codes"),
        ({"x_scale": torch.ones(4, 1)}, "x_scale goes with codes"),
        ({"weight_scale": torch.ones(32)}, "weight_scale must be"),
        ({"x": torch.zeros(4, 48).to(FLOAT8), "x_scale": torch.ones(4)}, "x_scale must be"),
        ({"bias": torch.zeros(31)}, "bias must be"),
        ({"out_dtype": torch.float64}, "out_dtype must be"),
        ({"bias": torch.zeros(32).requires_grad_()}, "no gradient passes here, but bias"),
        (
            {"x": torch.zeros(4, 48).to(FLOAT8), "x_scale": torch.ones(4, 1), "weight_only": True},
            "weight_only goes with",
        ),
        ({"backend": "cuda"}, "cannot run"),
        ({"backend": "cpu", "weight_only": True}, "cannot run"),
    ],
)
def test_bad_product(new, message):
    values = dict(zip(("x", "weight", "weight_scale", "bias"), layer(4, 48, 32, device="cpu"), strict=True)) | new
    with pytest.raises(ValueError, match=message):
        fp8_linear(**values)


@pytest.fixture
def quantized(monkeypatch):
    """The inputs that are quantised, in their order."""
    seen, quantize = [], fp8_quantize_rowwise

    def counting(x, **rest):
        seen.append(x)
        return quantize(x, **rest)

    monkeypatch.setattr(fp8, "fp8_quantize_rowwise", counting)
    return seen


@pytest.mark.parametrize("gradient", [False, True])
def test_layers_of_one_input_quantize_it_once(quantized, gradient):
    hidden = torch.randn(2, 3, 32, device=here(), requires_grad=gradient) * 1
    layers = [fp8_quantize_rowwise(torch.randn(48, 32, device=here())) for _ in range(3)]
    found = [fp8_linear(hidden, *one) for one in layers]
    assert len(quantized) == 1
    for one, y in zip(layers, found, strict=True):
        assert torch.equal(fp8_linear(hidden.clone(), *one), y)  # by codes of its own
    assert len(quantized) == 4


@pytest.mark.parametrize("route", [[0, 0], [0, -1]])
def test_layers_with_adapters_quantize_their_input_once(quantized, route):
    hidden, there = torch.randn(2, 3, 32, device=here()) * 1, torch.tensor(route, device=here())
    for _ in range(3):
        weight, weight_scale = fp8_quantize_rowwise(torch.randn(48, 32, device=here()))
        adapter = torch.randn(4, 32, device=here()), torch.randn(48, 4, device=here())
        routed_lora_linear(hidden, weight, None, [adapter], there, weight_scale=weight_scale)
    assert len(quantized) == 1


def test_an_input_that_was_written_or_is_another_is_quantized_anew(quantized):
    _, weight, weight_scale, _ = layer(1, 32, 48)
    x = torch.randn(6, 32, device=here())
    before = fp8_linear(x, weight, weight_scale)
    x.mul_(-3)
    assert torch.equal(fp8_linear(x, weight, weight_scale), fp8_linear(x.clone(), weight, weight_scale))
    assert not torch.equal(fp8_linear(x, weight, weight_scale), before)
    rows = x[2:], x[:4], x[::2]
    for part in rows:
        assert torch.equal(fp8_linear(part, weight, weight_scale), fp8_linear(part.clone(), weight, weight_scale))
    with torch.inference_mode():
        y = x.clone()
        fp8_linear(y, weight, weight_scale)
        y.mul_(2)
        assert torch.equal(fp8_linear(y, weight, weight_scale), fp8_linear(y.clone(), weight, weight_scale))


def test_codes_do_not_outlive_their_input():
    _, weight, weight_scale, _ = layer(1, 32, 48)
    x = torch.randn(6, 32, device=here())
    fp8_linear(x, weight, weight_scale)
    assert fp8._last.made is not None
    del x
    assert fp8._last.made is None


def test_parameters_without_gradients():
    with torch.no_grad():
        assert not fp8_quantize_rowwise(torch.nn.Parameter(torch.ones(2, 16)))[1].requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_device(dtype):
    x, weight, weight_scale, bias = layer(1000, 3072, 1024, dtype)
    (codes, x_scale), (want, want_scale) = (fp8_quantize_rowwise(x, backend=b) for b in ("triton", "torch"))
    assert torch.equal(bits(codes), bits(want))
    assert torch.equal(x_scale, want_scale)
    exact = (codes.double() * x_scale) @ (weight.double() * weight_scale).T + bias.double()
    numbers = x.double() @ (weight.double() * weight_scale).T + bias.double()
    for backend in (None, *BACKENDS):
        for weight_only, want in ((False, exact), (True, numbers)):
            if weight_only and backend == "triton" and dtype == torch.float32:
                continue
            y = fp8_linear(x, weight, weight_scale, bias, weight_only=weight_only, backend=backend)
            # torch._scaled_mm gives bfloat16 there.
            exactly = dtype == torch.float32 and (weight_only or backend == "triton")
            assert (y.double() - want).norm() / want.norm() < (1e-4 if exactly else 4e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", [None, "triton"])
def test_replayed_in_a_graph(backend):
    x, weight, weight_scale, bias = layer(256, 512, 512)
    run = lambda: fp8_linear(x, weight, weight_scale, bias, backend=backend)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.mul_(-3)
    graph.replay()
    assert torch.equal(captured, run())
