"""Operation 6: the modulated norm and its gated residual, against float64 and against diffusers' own modules."""

import pytest
import torch
from danceopd_kernels import adaln
from danceopd_kernels.adaln import adaln_modulate, reference
from danceopd_kernels.dispatch import has_triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_device import here

pytestmark = pytest.mark.usefixtures("device")

CUDA = torch.cuda.is_available()
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="no Triton"))]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative to the largest entry


def case(b, tokens, width, dtype=torch.float32, gated=False, seed=0):
    """(x, shift, scale, residual, gate), the last two None without a gate."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=generator).to(here(), dtype)  # noqa: E731
    tensors = [new(b, tokens, width) * 2 + 1, new(b, width), new(b, width) / 2]
    tensors += [new(b, tokens, width) + 3, new(b, width)] if gated else [None, None]
    return [None if t is None else t.requires_grad_() for t in tensors]


def run(tensors, backend, eps=1e-6):
    x, shift, scale, residual, gate = tensors
    result = adaln_modulate(x, shift, scale, residual=residual, gate=gate, eps=eps, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def gradients(outputs, tensors):
    """Of a sum that weights every output's entries differently."""
    loss = 0
    for i, output in enumerate(outputs):
        slope = torch.linspace(-1, 2 + i, output.numel(), device=here(), dtype=torch.float64).view(output.shape)
        loss = loss + (output.double() * slope.to(output.dtype).double()).sum()
    return torch.autograd.grad(loss, [t for t in tensors if t is not None])


def errors(tensors, backend):
    """Largest errors of the outputs and gradients, relative to the largest entry, against float64."""
    outputs = run(tensors, backend)
    assert all(o.dtype == tensors[0].dtype and o.shape == tensors[0].shape for o in outputs)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    h, out = reference(*exact, 1e-6)
    pairs = [*zip(outputs, (h, out) if len(outputs) == 2 else (out,), strict=True)]
    found, expected = gradients(outputs, tensors), gradients([b for _, b in pairs], exact)
    assert [g.dtype for g in found] == [t.dtype for t in tensors if t is not None]
    pairs += zip(found, expected, strict=True)
    return [((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in pairs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 19, 33), (2, 3, 4096)], ids=str)
def test_outputs_and_gradients(shape, gated, dtype, backend):
    worst = errors(case(*shape, dtype, gated), backend)
    assert max(worst) < TOLERANCE[dtype], worst


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
@given(st.integers(1, 3), st.integers(1, 20), st.integers(9, 300), st.booleans(), st.integers(0, 99))
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, b, tokens, width, gated, seed):
    worst = errors(case(b, tokens, width, gated=gated, seed=seed), backend)
    assert max(worst) < 3e-5, worst


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(gated):
    tensors = [None if t is None else t.detach().double().requires_grad_() for t in case(2, 2, 5, gated=gated)]
    given = [t for t in tensors if t is not None]
    plain = lambda *x: reference(*x, *tensors[len(x) :], 1e-6)  # noqa: E731
    assert torch.autograd.gradcheck(plain, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_mean_and_constant_rows(backend):
    x, shift, scale, *_ = case(1, 2, 256)
    with torch.no_grad():
        x[0, 0] += 1000  # a variance by the mean of squares would lose three digits more
        x[0, 1] = 5.0
    (out,) = run([x, shift, scale, None, None], backend)
    expected = reference(*(t.detach().double() for t in (x, shift, scale)), None, None, 1e-6)[1]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-3)
    assert torch.equal(out[0, 1], shift[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_diffusers_norms(backend):
    normalization = pytest.importorskip("diffusers.models.normalization")
    torch.manual_seed(0)
    x, embedding = torch.randn(2, 5, 48, device=here()), torch.randn(2, 48, device=here())
    continuous = normalization.AdaLayerNormContinuous(48, 48, elementwise_affine=False, eps=1e-6).to(here())
    scale, shift = continuous.linear(continuous.silu(embedding)).chunk(2, 1)
    torch.testing.assert_close(adaln_modulate(x, shift, scale, backend=backend), continuous(x, embedding))
    zero = normalization.AdaLayerNormZero(48).to(here())
    shift, scale, *rest = zero.linear(zero.silu(embedding)).chunk(6, 1)
    out, *expected = zero(x, emb=embedding)
    torch.testing.assert_close(adaln_modulate(x, shift, scale, backend=backend), out)
    assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_diffusers_block(backend):
    """JointTransformerBlock's forward with every norm, gate and residual but the last ones by this operation."""
    attention = pytest.importorskip("diffusers.models.attention")
    torch.manual_seed(0)
    block = attention.JointTransformerBlock(32, 2, 16).to(here())
    x, context, embedding = (torch.randn(2, n, 32, device=here()) for n in (6, 3, 1))
    embedding = embedding[:, 0]

    def fused(x, context):
        modulation = []
        for norm, stream in ((block.norm1, x), (block.norm1_context, context)):
            shift, scale, *rest = norm.linear(norm.silu(embedding)).chunk(6, 1)
            modulation.append((adaln_modulate(stream, shift, scale, backend=backend), *rest))
        attended = block.attn(hidden_states=modulation[0][0], encoder_hidden_states=modulation[1][0])
        result = []
        for stream, y, forward, (_, gate, shift, scale, last) in zip(
            (x, context), attended, (block.ff, block.ff_context), modulation, strict=True
        ):
            h, y = adaln_modulate(y, shift, scale, residual=stream, gate=gate, backend=backend)
            result.append(h + last[:, None] * forward(y))
        return result

    results = []
    for function in (fused, lambda x, context: block(x, context, embedding)[::-1]):
        leaves = [t.clone().requires_grad_() for t in (x, context)]
        outputs = function(*leaves)
        loss = sum(o.square().sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*leaves, *block.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_output_used(backend):
    tensors = case(1, 4, 32, gated=True)
    h, out = run(tensors, backend)
    residual, gate = torch.autograd.grad(h.sum(), tensors[3:], retain_graph=True)
    assert torch.equal(residual, torch.ones_like(residual))
    torch.testing.assert_close(gate, tensors[0].sum(1))
    assert torch.autograd.grad(out.sum(), tensors[0])[0].isfinite().all()


BAD = {
    r"x must be .*\[B, N, C\]": lambda x, s, r, g: ((x[0], s, s), {}),
    "a residual needs a gate": lambda x, s, r, g: ((x, s, s), {"residual": r}),
    "and a gate a residual": lambda x, s, r, g: ((x, s, s), {"gate": g}),
    "shift must be": lambda x, s, r, g: ((x, s[:1], s), {}),
    "scale must be float32": lambda x, s, r, g: ((x, s, s.double()), {}),
    "residual must be": lambda x, s, r, g: ((x, s, s), {"residual": r[:, :1], "gate": g}),
    "unknown backend": lambda x, s, r, g: ((x, s, s), {"backend": "gpu"}),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input(message):
    x, shift, _, residual, gate = case(2, 3, 16, gated=True)
    args, kwargs = BAD[message](x, shift, residual, gate)
    with pytest.raises(ValueError, match=message):
        adaln_modulate(*args, **kwargs)


@pytest.mark.skipif(not has_triton(), reason="no Triton")
def test_wide_rows():
    tensors = case(1, 1, adaln.MAX_WIDTH + 1)
    assert max(errors(tensors, None)) < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="4096 at most"):
        run(tensors, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [1536, 3072, 4096])
def test_real_sizes_on_a_gpu(width, dtype):
    worst = errors(case(2, 1000, width, dtype, gated=True), "triton")
    assert max(worst) < TOLERANCE[dtype], worst


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_graph_replay():
    tensors = case(2, 100, 256, torch.bfloat16, gated=True)

    def once():
        outputs = run(tensors, "triton")
        return *outputs, *torch.autograd.grad(sum(o.float().sum() for o in outputs), tensors)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, once(), strict=True))
