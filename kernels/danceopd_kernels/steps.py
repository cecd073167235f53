"""Operation 4: a solver's step in place, noise levels and the active mask read on the device.

heun_step_ and sde_step_ are parts for other trainers: DanceOPD's uses euler_step_ (docs/kernels.md: what they save).
"""

import math

import torch

from danceopd_kernels import checks, compiled
from danceopd_kernels.dispatch import choose, has_triton
from danceopd_kernels.routed_velocity_mse import block_of, limit

if has_triton():
    import triton
    import triton.language as tl

DTYPES = checks.FLOATS
BACKENDS = ("cpu", "cuda", "triton")


# ---------------------------------------------------------------------------------------------- definition


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _each(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...] in the dtype of the arithmetic."""
    return value.to(torch.promote_types(like.dtype, torch.float32)).view(-1, *(1,) * (like.dim() - 1))


def _guided(velocity, uncond, guidance_scale):
    if uncond is None:
        return _wide(velocity)
    return _wide(uncond) + _each(guidance_scale, velocity) * (_wide(velocity) - _wide(uncond))


def _write(z, moved, active) -> None:
    moved = moved.to(z.dtype)
    z.copy_(moved if active is None else torch.where(active.view(-1, *(1,) * (z.dim() - 1)), moved, z))


def reference_step(z, velocity, sigma, next_sigma, active, uncond, guidance_scale, other, other_uncond) -> None:
    """z += (next_sigma - sigma) v, v guided, or its mean with the guided velocity `other` at the step's end."""
    v = _guided(velocity, uncond, guidance_scale)
    if other is not None:
        v = (v + _guided(other, other_uncond, guidance_scale)) / 2
    _write(z, _wide(z) + _each(next_sigma - sigma, z) * v, active)


def reference_sde_step(z, velocity, sigma, next_sigma, noise, pole, noise_level, active) -> torch.Tensor:
    """Move z to mean + deviation * noise; return each sample's mean log density [B] (Flow-GRPO, eq. 9)."""
    dt = next_sigma - sigma
    s2 = noise_level**2 * sigma / (1 - torch.where(sigma == 1, pole, sigma))
    deviation = (s2 * -dt).sqrt()
    on_z, on_v = 1 + s2 / (2 * sigma) * dt, (1 + s2 * (1 - sigma) / (2 * sigma)) * dt
    moved = _each(on_z, z) * _wide(z) + _each(on_v, z) * _wide(velocity) + _each(deviation, z) * _wide(noise)
    _write(z, moved, active)
    return _log_density(_wide(noise).square().flatten(1).mean(1), sigma, next_sigma, pole, noise_level)


def _log_density(mean_square, sigma, next_sigma, pole, noise_level) -> torch.Tensor:
    """Works out a Gaussian step's log density, averaged over a sample's entries, from its noise's mean square [B]."""
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


def euler_step_(
    z: torch.Tensor,
    velocity: torch.Tensor,
    sigma: torch.Tensor,
    next_sigma: torch.Tensor,
    *,
    active: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    guidance_scale: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Moves latents along a velocity, in place: z += (next_sigma - sigma) (u + s (v - u)), without guidance of v.

    Everything is read on the device, so that a captured graph may be replayed after sigma, active or the scales
    changed in place. No gradient passes.

    Args:
        z: Latents [B, ...] in float32, bfloat16 or float16 (float64 in plain PyTorch), contiguous; noise at sigma 1.
        velocity: v, noise minus data, as z is.
        sigma: [B] float32, contiguous: each sample's noise level.
        next_sigma: As sigma: the one it goes to.
        active: [B] bool, contiguous: the samples that move; all if not given.
        uncond: u, as z is; goes with guidance_scale.
        guidance_scale: s [B] float32, contiguous.
        backend: "torch", "cpu", "cuda" or "triton"; the fastest that can if not given.

    Returns:
        z.

    Raises:
        ValueError: An argument's type, shape, dtype, device or layout does not fit, z shares memory with a velocity, a
            gradient would be lost, or the backend cannot run.

    Example:
        >>> z, v = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)
        >>> euler_step_(z, v, torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.25]))
    """
    return _step(z, velocity, sigma, next_sigma, active, uncond, guidance_scale, None, None, backend)


def heun_step_(
    z: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    sigma: torch.Tensor,
    next_sigma: torch.Tensor,
    *,
    active: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    second_uncond: torch.Tensor | None = None,
    guidance_scale: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Moves latents along the mean of two velocities, in place: z += (next_sigma - sigma) (first + second) / 2.

    Args:
        z: As in euler_step_, and so is what is not said here.
        first: The velocity at z.
        second: The velocity at Euler's end point.
        sigma: [B] float32.
        next_sigma: [B] float32.
        active: [B] bool.
        uncond: The unconditional velocity at z; goes with second_uncond and guidance_scale.
        second_uncond: The unconditional velocity at Euler's end point.
        guidance_scale: [B] float32.
        backend: As in euler_step_.

    Returns:
        z.

    Raises:
        ValueError: As in euler_step_.

    Example:
        >>> z, first, second = (torch.randn(2, 16, 8, 8) for _ in range(3))
        >>> heun_step_(z, first, second, torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.25]))
    """
    checks.tensor("second", second)
    return _step(z, first, sigma, next_sigma, active, uncond, guidance_scale, second, second_uncond, backend)


def _step(z, velocity, sigma, next_sigma, active, uncond, guidance_scale, other, other_uncond, backend):
    like = {"velocity" if other is None else "first": velocity, "second": other}
    optional = {"uncond": uncond, "second_uncond": other_uncond}
    like |= {name: value for name, value in optional.items() if value is not None}
    if other is None:
        del like["second"]
    _check(z, active, like, {"sigma": sigma, "next_sigma": next_sigma}, guidance_scale)
    if (uncond is None) != (guidance_scale is None) or (
        other is not None and (uncond is None) != (other_uncond is None)
    ):
        raise ValueError("guidance needs guidance_scale and an unconditional velocity beside each velocity")
    backend = choose(z, backend, DTYPES, BACKENDS, lambda backend: limit(backend, z))
    if not z.numel():
        return z
    args = (z, velocity, sigma, next_sigma, active, uncond, guidance_scale, other, other_uncond)
    if backend == "torch":
        reference_step(*args)
        return z
    _compiled_step(backend, *args) if backend in ("cpu", "cuda") else _triton_step(*args)
    return _changed(z)


def sde_step_(
    z: torch.Tensor,
    velocity: torch.Tensor,
    sigma: torch.Tensor,
    next_sigma: torch.Tensor,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    noise_level: float = 0.7,
    active: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Moves latents by Flow-GRPO's stochastic step, in place (arXiv 2505.05470, eq. 9), and returns its log density.

        z += (v + s^2 / (2 sigma) (z + (1 - sigma) v)) dt + s sqrt(-dt) noise
        dt = next_sigma - sigma,  s = noise_level sqrt(sigma / (1 - sigma))

    Args:
        z: As in euler_step_.
        velocity: As in euler_step_.
        sigma: [B] float32.
        next_sigma: [B] float32.
        noise: Standard normal, as z is.
        sigmas: [N + 1] float32, N at least 1: the trajectory's noise levels, of which the second stands in for sigma
            in s at the pole sigma = 1.
        noise_level: A number.
        active: [B] bool, as in euler_step_.
        backend: As in euler_step_.

    Returns:
        Each sample's log density, averaged over its entries: [B] float32 (float64 for latents in float64).

    Raises:
        ValueError: As in euler_step_.

    Example:
        >>> z, v, noise = (torch.randn(2, 16, 8, 8) for _ in range(3))
        >>> sigmas = torch.linspace(1, 0, 9)
        >>> log_density = sde_step_(z, v, sigmas[:1].repeat(2), sigmas[1:2].repeat(2), noise, sigmas)
    """
    checks.tensor("sigmas", sigmas, dtype=torch.float32, shape=("N + 1",))
    if sigmas.shape[0] < 2:
        raise ValueError(f"sigmas must hold at least two noise levels, got {sigmas.shape[0]}")
    noise_level = checks.number("noise_level", noise_level)
    _check(z, active, {"velocity": velocity, "noise": noise}, {"sigma": sigma, "next_sigma": next_sigma})
    checks.in_place("z", z, {"sigmas": checks.tensor("sigmas", sigmas, like=z)[1:2]})
    backend = choose(z, backend, DTYPES, BACKENDS, lambda backend: limit(backend, z))
    if not z.numel():
        raise ValueError(f"z holds no sample or no entry: {list(z.shape)}")
    args = (z, velocity, sigma, next_sigma, noise, sigmas[1:2], noise_level, active)
    if backend == "torch":
        return reference_sde_step(*args)
    density = _compiled_sde_step(backend, *args) if backend in ("cpu", "cuda") else _triton_sde_step(*args)
    _changed(z)
    return density


def _changed(z: torch.Tensor) -> torch.Tensor:
    """Tells autograd that z was written, so that a backward that needs the old values is refused."""
    if not z.is_inference():
        torch.autograd.graph.increment_version(z)
    return z


def _check(z, active, like, levels, guidance_scale=None) -> None:
    """like: what is as z is, by name; levels: of a float32 a sample."""
    checks.tensor("z", z, dtype=(*DTYPES, torch.float64))
    if z.dim() < 1:
        raise ValueError("z must be [B, ...], got one number")
    for name, tensor in like.items():
        checks.tensor(name, tensor, dtype=z.dtype, shape=tuple(z.shape), like=z)
        _check_contiguous(name, tensor)
    each = levels | {"guidance_scale": guidance_scale, "active": active}
    for name, value in each.items():
        if value is not None or name in levels:
            checks.tensor(
                name, value, dtype=torch.bool if name == "active" else torch.float32, shape=z.shape[:1], like=z
            )
            _check_contiguous(name, value)
    checks.in_place("z", z, like | {name: value for name, value in each.items() if value is not None})


def _check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
