"""Operation 4: a solver's step in place, noise levels and the active mask read on the device."""

import math

import torch

from danceopd_kernels import compiled
from danceopd_kernels.dispatch import choose, has_triton
from danceopd_kernels.routed_velocity_mse import block_of

if has_triton():
    import triton
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "cuda", "triton")


# ---------------------------------------------------------------------------------------------- definition


def _wide(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.float().view(-1, *(1,) * (like.dim() - 1))


def _guided(velocity, uncond, guidance_scale):
    if uncond is None:
        return velocity.float()
    return uncond.float() + _wide(guidance_scale, velocity) * (velocity.float() - uncond.float())


def reference_step(z, velocity, sigma, next_sigma, active, uncond, guidance_scale, other, other_uncond) -> None:
    """z += (next_sigma - sigma) v, v guided, or its mean with the guided velocity `other` at the step's end."""
    v = _guided(velocity, uncond, guidance_scale)
    if other is not None:
        v = (v + _guided(other, other_uncond, guidance_scale)) / 2
    moved = (z.float() + _wide(next_sigma - sigma, z) * v).to(z.dtype)
    z.copy_(moved if active is None else torch.where(_wide(active, z) != 0, moved, z))


def reference_sde_step(z, velocity, sigma, next_sigma, noise, pole, noise_level, active) -> torch.Tensor:
    """Move z to mean + deviation * noise; return each sample's mean log density [B] (Flow-GRPO, eq. 9)."""
    dt = next_sigma - sigma
    s2 = noise_level**2 * sigma / (1 - torch.where(sigma == 1, pole, sigma))
    deviation = (s2 * -dt).sqrt()
    on_z, on_v = 1 + s2 / (2 * sigma) * dt, (1 + s2 * (1 - sigma) / (2 * sigma)) * dt
    moved = _wide(on_z, z) * z.float() + _wide(on_v, z) * velocity.float() + _wide(deviation, z) * noise.float()
    moved = moved.to(z.dtype)
    z.copy_(moved if active is None else torch.where(_wide(active, z) != 0, moved, z))
    return _log_density(noise.float().square().flatten(1).mean(1), sigma, next_sigma, pole, noise_level)


def _log_density(mean_square, sigma, next_sigma, pole, noise_level) -> torch.Tensor:
    """Of the Gaussian step, averaged over a sample's entries: [B] float32. mean_square [B]: of the noise."""
    s2 = noise_level**2 * sigma / (1 - torch.where(sigma == 1, pole, sigma))
    deviation = (s2 * (sigma - next_sigma)).sqrt()
    return -mean_square / 2 - deviation.log() - math.log(2 * math.pi) / 2


# -------------------------------------------------------------------------------------------------- Triton

if has_triton():

    @triton.jit
    def _step_kernel(
        z,
        velocity,
        uncond,
        other,
        other_uncond,
        sigma,
        next_sigma,
        guidance_scale,
        active,
        n,
        GUIDED: tl.constexpr,
        HEUN: tl.constexpr,
        MASKED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample = tl.program_id(0).to(tl.int64)
        if MASKED:  # noqa: SIM102  (a constant: without it the load is not compiled)
            if tl.load(active + sample) == 0:
                return
        offset = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < n
        at = sample * n + offset
        v = tl.load(velocity + at, inside, other=0.0).to(tl.float32)
        if GUIDED:
            base = tl.load(uncond + at, inside, other=0.0).to(tl.float32)
            scale = tl.load(guidance_scale + sample)
            v = base + scale * (v - base)
        if HEUN:
            w = tl.load(other + at, inside, other=0.0).to(tl.float32)
            if GUIDED:
                base = tl.load(other_uncond + at, inside, other=0.0).to(tl.float32)
                w = base + scale * (w - base)
            v = (v + w) / 2
        dt = tl.load(next_sigma + sample) - tl.load(sigma + sample)
        old = tl.load(z + at, inside, other=0.0).to(tl.float32)
        tl.store(z + at, (old + dt * v).to(z.dtype.element_ty), inside)

    @triton.jit
    def _sde_kernel(
        z,
        velocity,
        noise,
        sigma,
        next_sigma,
        active,
        partial,  # [B, chunks] float32: sums of squared noise
        pole,
        noise_level,
        n,
        chunks,
        MASKED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sample = tl.program_id(0).to(tl.int64)
        chunk = tl.program_id(1)
        offset = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < n
        at = sample * n + offset
        s = tl.load(sigma + sample)
        dt = tl.load(next_sigma + sample) - s
        s2 = noise_level * noise_level * s / (1 - tl.where(s == 1.0, tl.load(pole), s))
        on_z = 1 + s2 / (2 * s) * dt
        on_v = (1 + s2 * (1 - s) / (2 * s)) * dt
        e = tl.load(noise + at, inside, other=0.0).to(tl.float32)
        tl.store(partial + sample * chunks + chunk, tl.sum(e * e))
        if MASKED:  # noqa: SIM102  (a constant: without it the load is not compiled)
            if tl.load(active + sample) == 0:
                return
        v = tl.load(velocity + at, inside, other=0.0).to(tl.float32)
        old = tl.load(z + at, inside, other=0.0).to(tl.float32)
        moved = on_z * old + on_v * v + tl.sqrt(s2 * -dt) * e
        tl.store(z + at, moved.to(z.dtype.element_ty), inside)


def _triton_step(z, velocity, sigma, next_sigma, active, uncond, guidance_scale, other, other_uncond) -> None:
    n = z[0].numel()
    block, warps = block_of(n)
    _step_kernel[(len(z), triton.cdiv(n, block))](
        z,
        velocity,
        velocity if uncond is None else uncond,
        velocity if other is None else other,
        velocity if other_uncond is None else other_uncond,
        sigma,
        next_sigma,
        sigma if guidance_scale is None else guidance_scale,
        sigma if active is None else active.view(torch.uint8),
        n,
        GUIDED=uncond is not None,
        HEUN=other is not None,
        MASKED=active is not None,
        BLOCK=block,
        num_warps=warps,
    )


def _triton_sde_step(z, velocity, sigma, next_sigma, noise, pole, noise_level, active) -> torch.Tensor:
    n = z[0].numel()
    block, warps = block_of(n)
    chunks = triton.cdiv(n, block)
    partial = torch.empty(len(z), chunks, dtype=torch.float32, device=z.device)
    _sde_kernel[(len(z), chunks)](
        z,
        velocity,
        noise,
        sigma,
        next_sigma,
        sigma if active is None else active.view(torch.uint8),
        partial,
        pole,
        noise_level,
        n,
        chunks,
        MASKED=active is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return _log_density(partial.sum(1) / n, sigma, next_sigma, pole, noise_level)


def configurations() -> list:
    """What resources.py compiles: the launcher's choice for a 1024 px latent."""
    from danceopd_kernels.resources import Configuration

    block, warps = block_of(16 * 128 * 128)
    numbers = dict.fromkeys(("sigma", "next_sigma", "guidance_scale", "partial", "pole"), "*fp32")
    numbers |= {"active": "*i8", "noise_level": "fp32", "n": "i32", "chunks": "i32"}
    result = []
    for dtype in ("bf16", "fp16", "fp32"):
        data = dict.fromkeys(("z", "velocity", "uncond", "other", "other_uncond", "noise"), f"*{dtype}")
        for name, guided, heun in (("euler_step_", False, False), ("heun_step_", True, True)):
            constants = {"GUIDED": guided, "HEUN": heun, "MASKED": True, "BLOCK": block}
            title = f"{name} {dtype}" + ", guided" * guided
            result.append(Configuration(title, _step_kernel, data | numbers, constants, warps, 128, streaming=True))
        constants = {"MASKED": True, "BLOCK": block}
        title = f"sde_step_ {dtype}"
        result.append(Configuration(title, _sde_kernel, data | numbers, constants, warps, 128, streaming=True))
    return result


# ------------------------------------------------------------------------------------------------- compiled


def _compiled_step(
    backend, z, velocity, sigma, next_sigma, active, uncond, guidance_scale, other, other_uncond
) -> None:
    compiled.call(
        backend,
        "step",
        z.dtype,
        z.device,
        z=z,
        velocity=velocity,
        uncond=uncond,
        other=other,
        other_uncond=other_uncond,
        sigma=sigma,
        next_sigma=next_sigma,
        guidance_scale=guidance_scale,
        active=active,
        samples=len(z),
        elements=z[0].numel(),
    )


def _compiled_sde_step(backend, z, velocity, sigma, next_sigma, noise, pole, noise_level, active) -> torch.Tensor:
    n = z[0].numel()
    sums = torch.empty(len(z), compiled.chunks(backend, n), dtype=torch.float32, device=z.device)
    compiled.call(
        backend,
        "sde_step",
        z.dtype,
        z.device,
        z=z,
        velocity=velocity,
        noise=noise,
        sigma=sigma,
        next_sigma=next_sigma,
        pole=pole,
        noise_level=noise_level,
        active=active,
        sums=sums,
        samples=len(z),
        elements=n,
    )
    return _log_density(sums.sum(1) / n, sigma, next_sigma, pole, noise_level)


# ---------------------------------------------------------------------------------------------- operation


def euler_step_(z, velocity, sigma, next_sigma, *, active=None, uncond=None, guidance_scale=None, backend=None):
    """z += (next_sigma - sigma) velocity in place, for the active samples; returns z.

    z, velocity, uncond [B, ...] contiguous in one dtype (fp32, bf16, fp16); sigma, next_sigma, guidance_scale [B]
    float32; active [B] bool, all without. With uncond the velocity is uncond + guidance_scale (velocity - uncond).
    Everything is read on the device, so that a captured graph may be replayed after sigma or active changed in place.
    Raises ValueError for shapes, dtypes or devices that do not fit, or a backend that cannot run.
    """
    return _step(z, velocity, sigma, next_sigma, active, uncond, guidance_scale, None, None, backend)


def heun_step_(
    z,
    first,
    second,
    sigma,
    next_sigma,
    *,
    active=None,
    uncond=None,
    second_uncond=None,
    guidance_scale=None,
    backend=None,
):
    """z += (next_sigma - sigma) (first + second) / 2 in place; second is the velocity at Euler's end point.

    As euler_step_; with guidance both velocities have an unconditional one.
    """
    return _step(z, first, sigma, next_sigma, active, uncond, guidance_scale, second, second_uncond, backend)


def _step(z, velocity, sigma, next_sigma, active, uncond, guidance_scale, other, other_uncond, backend):
    _check(z, active, (velocity, uncond, other, other_uncond), (sigma, next_sigma, guidance_scale))
    if (uncond is None) != (guidance_scale is None) or (
        other is not None and (uncond is None) != (other_uncond is None)
    ):
        raise ValueError("guidance needs guidance_scale and an unconditional velocity beside each velocity")
    backend = choose(z, backend, DTYPES, BACKENDS)
    args = (z, velocity, sigma, next_sigma, active, uncond, guidance_scale, other, other_uncond)
    if backend in ("cpu", "cuda"):
        _compiled_step(backend, *args)
    else:
        (_triton_step if backend == "triton" else reference_step)(*args)
    return z


def sde_step_(z, velocity, sigma, next_sigma, noise, sigmas, *, noise_level=0.7, active=None, backend=None):
    """Flow-GRPO's stochastic step in place; returns each sample's log density, averaged over its entries: [B] float32.

    As euler_step_; noise [B, ...] standard normal; sigmas [N + 1] float32, the trajectory's noise levels, of which
    the second stands in for sigma at the pole sigma = 1.
    """
    _check(z, active, (velocity, noise), (sigma, next_sigma))
    backend = choose(z, backend, DTYPES, BACKENDS)
    args = (z, velocity, sigma, next_sigma, noise, sigmas[1:2], noise_level, active)
    if backend in ("cpu", "cuda"):
        return _compiled_sde_step(backend, *args)
    return (_triton_sde_step if backend == "triton" else reference_sde_step)(*args)


def _check(z, active, like, per_sample) -> None:
    if not z.is_contiguous():
        raise ValueError("z is changed in place and must be contiguous")
    for tensor in like:
        if tensor is None:
            continue
        if (
            tensor.shape != z.shape
            or tensor.dtype != z.dtype
            or tensor.device != z.device
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"expected a contiguous {z.dtype} {list(z.shape)} on {z.device} as z is, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    for value in (*per_sample, active):
        if value is None:
            continue
        if value.shape != (len(z),) or value.device != z.device or not value.is_contiguous():
            raise ValueError(
                f"expected one value a sample, contiguous [{len(z)}] on {z.device}, got {list(value.shape)} "
                f"on {value.device} with strides {value.stride()}"
            )
    for value in per_sample:
        if value is not None and value.dtype != torch.float32:
            raise ValueError(f"noise levels and guidance scales must be float32, got {value.dtype}")
    if active is not None and active.dtype != torch.bool:
        raise ValueError(f"active must be bool, got {active.dtype}")
