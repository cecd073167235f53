"""Operation 4 against float64, diffusers' scheduler and torch.distributions."""

import pytest
import torch
from danceopd_kernels import compiled, euler_step_, heun_step_, sde_step_
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A rounding to the dtype; Triton's interpreter cuts bf16 off instead of rounding.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def tensors(shape, dtype, count, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def levels(samples, device):
    sigma = torch.linspace(1, 0.3, samples, device=device)
    return sigma, sigma - 0.25


def wide(value, like):
    return value.double().view(-1, *(1,) * (like.dim() - 1))


def close(got, wanted):
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@settings(max_examples=4)
@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_euler_and_heun(place, dtype, guided, masked, shape):
    backend, device = place
    samples = shape[0]
    z, first, second, uncond, second_uncond = tensors(shape, dtype, 5, device)
    sigma, next_sigma = levels(samples, device)
    guidance = {"uncond": uncond, "guidance_scale": torch.linspace(0, 6, samples, device=device)} if guided else {}
    active = torch.arange(samples, device=device) % 2 == 0 if masked else None

    def combined(v, u):
        return wide(guidance["guidance_scale"], z) * (v.double() - u.double()) + u.double() if guided else v.double()

    v, w = combined(first, uncond), combined(second, second_uncond)
    for velocity in (v, (v + w) / 2):
        moved = z.double() + wide(next_sigma - sigma, z) * velocity
        wanted = moved if active is None else torch.where(wide(active, z) != 0, moved, z.double())
        got, options = z.clone(), {"active": active, "backend": backend, **guidance}
        if velocity is v:
            result = euler_step_(got, first, sigma, next_sigma, **options)
        else:
            more = {"second_uncond": second_uncond} if guided else {}
            result = heun_step_(got, first, second, sigma, next_sigma, **options, **more)
        assert result is got
        close(got, wanted)
        if masked:
            assert torch.equal(got[1::2], z[1::2])


def test_a_whole_trajectory_is_that_of_diffusers(place):
    from diffusers import FlowMatchEulerDiscreteScheduler

    backend, device = place
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    (z,) = tensors((2, 4, 6, 6), torch.float32, 1, device)
    theirs = z.clone()
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * z)
        theirs = scheduler.step(torch.sin(3 * theirs), t, theirs).prev_sample
        sigma, next_sigma = (scheduler.sigmas[k].to(device).expand(2).contiguous() for k in (i, i + 1))
        euler_step_(z, velocity, sigma, next_sigma, backend=backend)
    torch.testing.assert_close(z, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (4, 9001), (1, 2)])
def test_sde_step(place, dtype, masked, shape):
    backend, device = place
    z, velocity, noise = tensors(shape, dtype, 3, device)
    sigmas = torch.tensor([1.0, 0.9, 0.6, 0.25, 0.0], device=device)
    at = torch.arange(shape[0], device=device)  # the first sample stands at the pole
    sigma, next_sigma = sigmas[at].contiguous(), sigmas[at + 1].contiguous()
    active = at != 2 if masked else None
    got = z.clone()
    density = sde_step_(got, velocity, sigma, next_sigma, noise, sigmas, active=active, backend=backend)

    s, dt = sigma.double(), (next_sigma - sigma).double()
    level = 0.7 * (s / (1 - torch.where(s == 1, sigmas[1].double(), s))).sqrt()
    clean, spread = z.double() - wide(s, z) * velocity.double(), level**2 / (2 * s)
    # Flow-GRPO, eq. 9: dz = (v + spread (z + (1 - sigma) v)) dt + level sqrt(-dt) noise, z + (1 - sigma) v = clean + v.
    drift = velocity.double() + wide(spread, z) * (clean + velocity.double())
    mean, deviation = z.double() + wide(dt, z) * drift, level * (-dt).sqrt()
    wanted = mean + wide(deviation, z) * noise.double()
    if masked:
        wanted = torch.where(wide(active, z) != 0, wanted, z.double())
    close(got, wanted)
    normal = torch.distributions.Normal(mean, wide(deviation, z).expand_as(mean))
    reached = mean + wide(deviation, z) * noise.double()
    torch.testing.assert_close(density.double(), normal.log_prob(reached).flatten(1).mean(1), rtol=1e-5, atol=1e-5)


SETS = {"avx512": ("base", "avx2", "avx512"), "avx2": ("base", "avx2"), "base": ("base",)}


@pytest.fixture
def instruction_sets():
    """Yields each instruction set of this processor, one after the other, in use."""
    module = compiled.module("cpu")
    if module is None:
        pytest.skip("the cpu module was not built")

    def each():
        for name in SETS[module.instruction_set()]:
            module.use(name)
            yield name

    yield each()
    module.use(module.instruction_set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_hosts_formats_are_torchs(instruction_sets, dtype):
    """Every number there and back, and the rounding of sums over the whole range."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    one, half = torch.ones(1), torch.full((1,), 0.5)
    velocity = every.flip(1).roll(12345, 1)
    wanted = (every.float() + -0.5 * velocity.float()).to(dtype)
    for _ in instruction_sets:
        still = euler_step_(every.clone(), torch.zeros_like(every), one, half, backend="cpu")
        assert torch.equal(still.isnan(), every.isnan())
        assert torch.equal(still.nan_to_num(), every.nan_to_num())
        for size in (every.numel(), 1, 7, 133):  # what fills no whole register or tile too
            moved = euler_step_(every[:, -size:].clone(), velocity[:, -size:].clone(), one, half, backend="cpu")
            assert torch.equal(moved.isnan(), wanted[:, -size:].isnan())
            assert torch.equal(moved.nan_to_num(), wanted[:, -size:].nan_to_num())


def test_every_instruction_set_gives_the_same_steps(instruction_sets):
    results = []
    for _ in instruction_sets:
        for dtype in DTYPES:
            z, v, u = tensors((3, 8, 1100), dtype, 3, "cpu")
            scale = torch.tensor([1.0, 2.0, 3.0])
            results.append(euler_step_(z, v, *levels(3, "cpu"), uncond=u, guidance_scale=scale, backend="cpu"))
    for i, result in enumerate(results):
        assert torch.equal(result, results[i % len(DTYPES)])
    with pytest.raises(ValueError, match="no instruction set"):
        compiled.module("cpu").use("avx1024")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity": torch.zeros(2, 3, 5)}, "velocity must be float32"),
        ({"velocity": torch.zeros(2, 3, 4).half()}, "velocity must be float32"),
        ({"velocity": torch.zeros(2, 4, 3).transpose(1, 2)}, "contiguous"),
        ({"z": torch.zeros(2, 4, 3).transpose(1, 2)}, "contiguous"),
        ({"sigma": torch.zeros(3)}, "sigma must be float32"),
        ({"sigma": torch.zeros(2).double()}, "sigma must be float32"),
        ({"sigma": torch.zeros(1).expand(2)}, "contiguous"),
        ({"active": torch.ones(2)}, "active must be bool"),
        ({"guidance_scale": torch.ones(2)}, "guidance needs"),
        ({"uncond": torch.zeros(2, 3, 4)}, "guidance needs"),
        ({"z": torch.zeros(1, 3, 4).expand(2, 3, 4)}, "contiguous"),
        ({"z": torch.zeros(2, 3, 4, dtype=torch.int64)}, "z must be float32"),
        ({"z": torch.zeros(2, 3, 4, requires_grad=True)}, "no gradient passes here, but z"),
        ({"velocity": torch.zeros(2, 3, 4, requires_grad=True)}, "no gradient passes here, but velocity"),
        ({"backend": "cuda"}, "cannot run"),
    ],
)
def test_bad_input(change, message):
    if change.get("backend") and torch.cuda.is_available():
        pytest.skip("of machines without a GPU")
    made = {
        "z": torch.zeros(2, 3, 4),
        "velocity": torch.zeros(2, 3, 4),
        "sigma": torch.ones(2),
        "next_sigma": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        euler_step_(**made | change)


@pytest.mark.parametrize("wrong", [torch.ones(1), torch.ones(0), torch.ones(1, 3), torch.ones(3, dtype=torch.float64)])
def test_noise_levels_without_a_second_are_refused(place, wrong):
    backend, device = place
    z, velocity, noise = tensors((2, 3), torch.float32, 3, device)
    with pytest.raises(ValueError, match="sigmas must"):
        sde_step_(z, velocity, *levels(2, device), noise, wrong.to(device), backend=backend)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_replays_in_a_cuda_graph_with_new_levels_and_mask(backend):
    if backend == "cuda" and compiled.module("cuda") is None:
        pytest.skip("the cuda module was not built")
    z, velocity = tensors((3, 4, 33), torch.bfloat16, 2, "cuda")
    sigma, next_sigma = levels(3, "cuda")
    active = torch.tensor([True, True, True], device="cuda")
    start = z.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        euler_step_(z, velocity, sigma, next_sigma, active=active, backend=backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        euler_step_(z, velocity, sigma, next_sigma, active=active, backend=backend)
    z.copy_(start)
    sigma.mul_(0.5)
    active[1] = False
    graph.replay()
    wanted = euler_step_(start.clone(), velocity, sigma, next_sigma, active=active, backend="torch")
    torch.testing.assert_close(z, wanted)
