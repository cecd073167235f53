"""Operation 2: the fused output head against the plain composition in float64."""

import pytest
import torch
from danceopd_kernels import output_head
from danceopd_kernels.dispatch import has_triton
from danceopd_kernels.output_head import Head, fused_output_head_mse, reference
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_device import here
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.usefixtures("device")

CUDA = torch.cuda.is_available()
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="no Triton"))]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative to the largest entry


def head(n, tokens, width, outputs, dtype=torch.float32, generator=None, grad=False):
    new = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = (
        new(n, tokens, width) * 2 + 0.5,
        new(n, width) / 2,
        new(n, width) / 2,
        new(outputs, width) / width**0.5,
        new(outputs),
    )
    return Head(*(t.to(here(), dtype).requires_grad_(grad) for t in tensors))


def case(
    route, tokens, width, widths, outputs, dtype=torch.float32, guided=False, masked=False, weighted=False, seed=0
):
    """(student, teachers, route), keywords of fused_output_head_mse."""
    generator = torch.Generator().manual_seed(seed)
    b, route = len(route), torch.tensor(route)
    counts = torch.bincount(route, minlength=len(widths)).tolist()
    args = (head(b, tokens, width, outputs, dtype, generator, grad=True),)
    teachers = [head(n, tokens, w, outputs, dtype, generator) for n, w in zip(counts, widths, strict=True)]
    kwargs = {}
    if guided:
        branches = [head(n, tokens, w, outputs, dtype, generator)[:3] for n, w in zip(counts, widths, strict=True)]
        kwargs |= {"uncond": branches, "guidance_scale": 1 + 3 * torch.rand(b, generator=generator).to(here())}
    if masked:
        lengths = torch.randint(1, tokens + 1, (b, 1), generator=generator)
        kwargs["mask"] = (torch.arange(tokens) < lengths).to(here())
    if weighted:
        kwargs["weight"] = torch.rand(b, generator=generator).to(here()) + 0.5
    return (*args, teachers, route.to(here())), kwargs


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def exact(args, kwargs, upstream):
    """Losses [B] and the gradients of (upstream * losses).sum() in the student, by autograd in float64."""
    student, teachers, route = args
    student = Head(*(x.detach().double().requires_grad_() for x in student))
    teachers = [Head(*map(double, t)) for t in teachers]
    uncond = kwargs.get("uncond") and [[double(x) for x in branch] for branch in kwargs["uncond"]]
    rest = [double(kwargs.get(name)) for name in ("guidance_scale", "weight", "mask")]
    losses = reference(student, teachers, route, uncond, *rest, 1e-6)
    return losses.detach(), torch.autograd.grad((upstream.double() * losses).sum(), student)


def errors(args, kwargs, backend):
    """Largest errors of the losses and of each gradient, relative to the largest entry."""
    upstream = torch.linspace(0.5, 2, len(args[0].hidden), device=here())
    losses = fused_output_head_mse(*args, **kwargs, reduction="none", backend=backend)
    found = torch.autograd.grad((upstream * losses).sum(), args[0])
    assert losses.dtype == torch.float32
    assert [x.dtype for x in found] == [x.dtype for x in args[0]]
    losses_exact, gradients = exact(args, kwargs, upstream)
    pairs = zip((losses, *found), (losses_exact, *gradients), strict=True)
    return [((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in pairs]


CASES = {
    "one sample": {"route": [0], "tokens": 5, "width": 24, "widths": [24], "outputs": 16},
    "guided": {"route": [1, 0, 1], "tokens": 70, "width": 40, "widths": [33, 72], "outputs": 64, "guided": True},
    "empty route": {
        "route": [2, 0, 2, 2], "tokens": 9, "width": 17, "widths": [17, 48, 31], "outputs": 12, "masked": True,
        "weighted": True,
    },
    "all": {
        "route": [0, 1, 1], "tokens": 131, "width": 65, "widths": [96, 32], "outputs": 49, "guided": True,
        "masked": True, "weighted": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", list(CASES))
def test_losses_and_gradients(name, dtype, backend):
    worst = errors(*case(**CASES[name], dtype=dtype), backend)
    assert max(worst) < TOLERANCE[dtype], worst


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
@given(st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, data):
    draw = data.draw
    teachers = draw(st.integers(1, 3))
    args, kwargs = case(
        draw(st.lists(st.integers(0, teachers - 1), min_size=1, max_size=3)),
        draw(st.integers(1, 40)),
        draw(st.integers(9, 70)),
        draw(st.lists(st.integers(9, 70), min_size=teachers, max_size=teachers)),
        draw(st.integers(1, 64)),
        guided=draw(st.booleans()),
        masked=draw(st.booleans()),
        weighted=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    worst = errors(args, kwargs, backend)
    assert max(worst) < TOLERANCE[torch.float32], worst


def test_gradcheck():
    args, kwargs = case([0, 1], 3, 5, [4, 6], 3, guided=True, masked=True, weighted=True)
    student = Head(*(x.detach().double().requires_grad_() for x in args[0]))
    teachers = [Head(*map(double, t)) for t in args[1]]
    uncond = [[double(x) for x in branch] for branch in kwargs["uncond"]]
    rest = [double(kwargs[name]) for name in ("guidance_scale", "weight", "mask")]
    plain = lambda *x: reference(Head(*x), teachers, args[2], uncond, *rest, 1e-6)  # noqa: E731
    assert torch.autograd.gradcheck(plain, tuple(student))
    kwargs = kwargs | {"uncond": uncond, "reduction": "none", "backend": "torch"}
    chunked = lambda *x: fused_output_head_mse(Head(*x), teachers, args[2], **kwargs)  # noqa: E731
    assert torch.autograd.gradcheck(chunked, tuple(student))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_and_programs_add_up(backend, monkeypatch):
    monkeypatch.setattr(output_head, "CHUNK", 24)  # several chunks a sample; with three tiles a program has two
    worst = errors(*case([0, 1, 0], 150, 20, [20, 36], 16, guided=True, masked=True), backend)
    monkeypatch.setattr(output_head, "CHUNK", 400)  # several samples a chunk
    worst += errors(*case([0, 1, 0], 150, 20, [20, 36], 16, guided=True, masked=True), backend)
    assert max(worst) < TOLERANCE[torch.float32], worst


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_and_with_few(backend):
    args, kwargs = case([0, 1, 1], 20, 24, [24, 16], 16, guided=True)
    kwargs["backend"] = backend
    loss = fused_output_head_mse(*args, **kwargs)
    full = torch.autograd.grad(loss, args[0])
    with torch.no_grad():
        torch.testing.assert_close(fused_output_head_mse(*args, **kwargs), loss.detach())
    frozen = Head(*args[0][:3], args[0].weight.detach(), args[0].bias.detach())  # as when adapters are trained
    again = fused_output_head_mse(frozen, *args[1:], **kwargs)
    few = torch.autograd.grad(again, frozen[:3])
    torch.testing.assert_close(again, loss)  # other tiles, on a GPU
    torch.testing.assert_close(few, full[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_for_all_samples(backend):
    args, kwargs = case([0, 1], 5, 24, [24, 16], 16, guided=True)
    scale = torch.full((2,), 2.5, device=here())
    uncond = {"uncond": kwargs["uncond"], "backend": backend}
    loss = fused_output_head_mse(*args, **uncond, guidance_scale=scale, weight=scale)
    assert fused_output_head_mse(*args, **uncond, guidance_scale=2.5, weight=scale[:1]) == loss
    assert fused_output_head_mse(*args, **uncond, guidance_scale=2.5, weight=2.5) == loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_kept_unless_masked(value, backend):
    args, kwargs = case([0, 1, 1], 12, 24, [24, 16], 16)
    clean = fused_output_head_mse(*args, **kwargs, reduction="none", backend=backend)
    student = Head(*(x.detach().clone() for x in args[0]))
    student.hidden[0, 3, 4] = value
    args[1][1].hidden[1, 5, 6] = value  # of sample 2
    student = Head(*(x.requires_grad_() for x in student))
    losses = fused_output_head_mse(student, *args[1:], reduction="none", backend=backend)
    assert losses.isfinite().tolist() == [False, True, False]
    assert losses[1] == clean[1]
    hidden, weight = torch.autograd.grad(losses.sum(), (student.hidden, student.weight))
    assert hidden.isfinite().all(2).logical_not().nonzero().tolist() == [[0, 3], [2, 5]]
    assert not weight.isfinite().any()

    mask = torch.ones(3, 12, dtype=torch.bool, device=here())
    mask[0, 3] = mask[2, 5] = False
    loss = fused_output_head_mse(student, *args[1:], mask=mask, backend=backend)
    gradients = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[0][~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("weight", "scale"), [(1e-4, 2.0**20), (3e5, 2.0**-12)])
def test_fp16_gradients_are_not_lost_before_the_loss_is_scaled(backend, weight, scale):
    """The gradient of the loss itself is below fp16's smallest number here, or beyond its largest."""
    args, kwargs = case([0, 1], 64, 32, [32, 16], 64, dtype=torch.float16)
    loss = fused_output_head_mse(*args, **kwargs, weight=weight, backend=backend)
    found = torch.autograd.grad(loss * scale, args[0])
    kwargs["weight"] = torch.full((2,), weight, device=here())
    _, expected = exact(args, kwargs, torch.full((2,), scale / 2, device=here()))
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() < 5e-3 * b.abs().max()


def test_orders_of_a_patch():
    """A teacher that packs (height, width, channel) against a student that packs (channel, height, width)."""
    p, c, tokens = 2, 4, 6
    student, teacher = (head(2, tokens, 16, p * p * c) for _ in range(2))
    order = torch.arange(p * p * c, device=here()).view(p, p, c).permute(2, 0, 1).flatten()
    loss = fused_output_head_mse(student, teacher._replace(weight=teacher.weight[order], bias=teacher.bias[order]))
    a = output_head.velocity(student, 1e-6).view(2, tokens, c, p, p)
    b = output_head.velocity(teacher, 1e-6).view(2, tokens, p, p, c)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(a, torch.einsum("bnhwc->bnchw", b)))


def test_diffusers_head():
    normalization = pytest.importorskip("diffusers.models.normalization")
    torch.manual_seed(0)
    losses, heads = [], []
    for width in (32, 48):
        norm = normalization.AdaLayerNormContinuous(width, 16, elementwise_affine=False, eps=1e-6).to(here())
        projection = torch.nn.Linear(width, 16).to(here())
        hidden, embedding = torch.randn(2, 7, width, device=here()), torch.randn(2, 16, device=here())
        losses.append(projection(norm(hidden, embedding)))
        scale, shift = norm.linear(norm.silu(embedding)).chunk(2, 1)
        heads.append(Head(hidden, shift, scale, projection.weight, projection.bias))
    expected = torch.nn.functional.mse_loss(losses[0], losses[1])
    torch.testing.assert_close(fused_output_head_mse(*heads), expected)


class Sizes(TorchDispatchMode):
    """Shapes of everything that is made under it."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.shapes += [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


def test_no_velocity_is_written(monkeypatch):
    chunk, outputs = 16, 9
    monkeypatch.setattr(output_head, "CHUNK", chunk)
    args, kwargs = case([0, 1, 1], 50, 20, [20, 28], outputs, guided=True)
    student = Head(*(x.detach() for x in args[0]))
    sums, *grads = output_head._outputs(student.hidden, student.weight, True, True)
    uncond, scale = kwargs["uncond"], kwargs["guidance_scale"]
    with Sizes() as sizes:  # the mode does not see what runs within the registered operation
        output_head.run_chunked(
            student, args[1], args[2].argsort(stable=True), uncond, scale, scale, None, 1e-6, sums, grads
        )
    velocities = [s for s in sizes.shapes if len(s) == 3 and s[2] == outputs]
    assert velocities
    assert all(s[0] * s[1] <= chunk for s in velocities)
    with Sizes() as sizes:
        fused_output_head_mse(*args, **kwargs, backend="torch").backward()
    assert not [s for s in sizes.shapes if len(s) == 3 and s[1:] == (50, outputs)]


BAD = {
    "must be .*\\[n, N, C\\]": lambda a, k: ((a[0]._replace(hidden=a[0].hidden[0]), *a[1:]), k),
    "student: shift must be": lambda a, k: ((a[0]._replace(shift=a[0].shift[:1]), *a[1:]), k),
    "student holds no token": lambda a, k: ((Head(*(x[:0] for x in a[0][:3]), *a[0][3:]), [a[1][0]], None), k),
    "teacher 0: weight must be": lambda a, k: ((a[0], [a[1][0]._replace(weight=a[1][0].weight[:4]), a[1][1]], a[2]), k),
    "teacher 1: hidden must be .*float32": lambda a, k: (
        (a[0], [a[1][0], Head(*(x.double() for x in a[1][1]))], a[2]),
        k,
    ),
    "route must be int64": lambda a, k: ((*a[:2], a[2].int()), k),
    "a route for more than one": lambda a, k: (a[:2], k),
    "teachers hold 1 samples, the student 3": lambda a, k: ((a[0], a[1][:1], None), k),
    "uncond: 1 branches for 2": lambda a, k: (a, k | {"uncond": k["uncond"][:1]}),
    "uncond 0: shift must be": lambda a, k: (a, k | {"uncond": [[b[0], b[0], b[2]] for b in k["uncond"]]}),
    "needs both uncond": lambda a, k: (a, {"guidance_scale": 2.0}),
    "guidance_scale must be a number or \\[3\\]": lambda a, k: (a, k | {"guidance_scale": torch.ones(2)}),
    "mask must be bool": lambda a, k: (a, k | {"mask": torch.ones(3, 5, device=here())}),
    "unknown reduction": lambda a, k: (a, k | {"reduction": "sum"}),
    "unknown backend": lambda a, k: (a, k | {"backend": "gpu"}),
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input(message):
    args, kwargs = BAD[message](*case([0, 1, 1], 5, 8, [8, 6], 16, guided=True))
    with pytest.raises(ValueError, match=message):
        fused_output_head_mse(*args, **kwargs)


def test_route_that_does_not_fit():
    if here() == "cuda":
        pytest.skip("would wait for the device")
    args, kwargs = case([0, 1, 1], 5, 8, [8, 6], 16)
    with pytest.raises(ValueError, match="the route asks for"):
        fused_output_head_mse(*args[:2], torch.tensor([0, 0, 1]), **kwargs)


@pytest.mark.skipif(not has_triton(), reason="no Triton")
def test_many_outputs():
    worst = errors(*case([0], 70, 20, [24], 100, dtype=torch.bfloat16), "triton")
    assert max(worst) < TOLERANCE[torch.bfloat16], worst
    args, kwargs = case([0], 3, 20, [20], 65)
    assert max(errors(args, kwargs, None)) < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="65 outputs, 64 at most"):
        fused_output_head_mse(*args, backend="triton")


def test_operation_is_registered_right():
    args, _ = case([0, 0], 3, 8, [8], 4)
    flat = (*args[0], [*args[1][0]], args[2].argsort(), [], None, None, None, 1e-6, True, True, "torch")
    torch.library.opcheck(output_head._operation, flat)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16", "fp16"])
def test_real_sizes_on_a_gpu(dtype):
    args, kwargs = case([0, 1, 0], 1000, 1536, [1536, 2432], 64, dtype=dtype, guided=True, masked=True)
    worst = errors(args, kwargs, "triton")
    assert max(worst) < TOLERANCE[dtype], worst


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_graph_replay():
    args, kwargs = case([0, 1, 1], 130, 64, [64, 96], 64, dtype=torch.bfloat16, guided=True, masked=True)

    def run():
        loss = fused_output_head_mse(*args, **kwargs, reduction="none", backend="triton")
        return loss, *torch.autograd.grad(loss.sum(), args[0])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        args[0].hidden.normal_()
        kwargs["guidance_scale"].add_(1)
        args[2].copy_(torch.tensor([1, 0, 1]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
