"""The student's own trajectory: no gradient, and not a step that nobody looks at."""

from collections.abc import Sequence

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.copies import to_device
from danceopd.core.fields import Field
from danceopd.core.phase import phase
from danceopd.core.solver import SOLVERS, extrapolate, half_ratio, step


@phase("rollout")
@torch.no_grad()
def rollout(
    field: Field,
    noise: torch.Tensor,
    conditioning: Conditioning,
    sigmas: torch.Tensor,
    until: torch.Tensor,
    solver: str = "euler",
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integrates dz = v d sigma from noise and returns the states at the trajectory indices asked.

    A sample leaves the batch once its deepest index is reached, so the field is evaluated exactly
    sum(until.max(1) - start) times per sample in all (Heun: twice that, less one for each trajectory that ends at
    sigma 0). A field that brings a ``rollout`` of its own is asked for it, and may decline by None.

    Args:
        field: The field to integrate.
        noise: Float tensor [B, ...], the states at index 0, or at `start` where that is given.
        conditioning: What the B samples are conditioned on.
        sigmas: float32 tensor [N + 1] on the CPU, the noise levels, falling from 1.
        until: int64 tensor [B, K] on the CPU, so that no step waits for the device: the indices asked, in [0, N].
        solver: ``euler``, ``heun`` or ``ab2``, the two-step Adams-Bashforth method.
        start: int64 tensor [B] on the CPU, the index at which each trajectory begins; 0 if not given.

    Returns:
        The states [B, K, ...] in float32 (float64 of noise in float64) and their sigmas [B, K].

    Raises:
        ValueError: For an unknown solver, an index outside the grid, or one before its start.

    Example:
        >>> def to_zero(latents, sigma, conditioning):  # the field of data that is zero
        ...     return latents / sigma[:, None]
        >>> noise, prompts = torch.ones(2, 3), Conditioning(torch.tensor([0, 1]))
        >>> states, sigma = rollout(to_zero, noise, prompts, sigma_grid(4), torch.tensor([[1, 3], [2, 2]]))
        >>> states[:, :, 0], sigma
        (tensor([[0.7500, 0.2500],
                [0.5000, 0.5000]]), tensor([[0.7500, 0.2500],
                [0.5000, 0.5000]]))
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; use one of {', '.join(SOLVERS)}")
    if until.min() < 0 or until.max() >= len(sigmas):
        raise ValueError(f"trajectory indices must lie in [0, {len(sigmas) - 1}]")
    start = torch.zeros(len(until), dtype=torch.int64) if start is None else start
    if start.min() < 0 or (until < start[:, None]).any():
        raise ValueError("a trajectory cannot start after an index that is asked of it")
    sigmas = sigmas.cpu()
    own = getattr(field, "rollout", None)
    states = None if own is None else own(noise, conditioning, sigmas, until, solver, start)
    if states is None:
        states = _integrate(field, noise, conditioning, sigmas, until, solver, start)
    return states, to_device(sigmas[until], noise.device)


def _integrate(field, noise, conditioning, sigmas, until, solver, start) -> torch.Tensor:
    """Steps all samples together, the deepest first: [B, K, ...]."""
    depth, order = until.amax(1).sort(descending=True, stable=True)
    wanted, start, conditioning = until[order], start[order], conditioning[order]
    order, there = (to_device(value, noise.device) for value in (order, sigmas))
    z = noise[order].to(torch.promote_types(noise.dtype, torch.float32))
    states = z[:, None].repeat(1, until.shape[1], *(1,) * (z.dim() - 1))
    previous = torch.zeros_like(z) if solver == "ab2" else None
    deeper = (depth > torch.arange(len(sigmas))[:, None]).sum(1).tolist()
    reached, latest = rows_by_index(wanted, len(sigmas), z.device), int(start.max())
    for i in range(int(start.min()), int(depth[0])):
        n = deeper[i]  # the n deepest samples go on, those of them that have started
        late = i < latest and bool((start[:n] > i).any())
        if late and not (start[:n] <= i).any():
            continue
        rows = (start[:n] <= i).nonzero()[:, 0] if late else slice(n)
        active, part = rows if isinstance(rows, slice) else to_device(rows, z.device), conditioning[rows]
        if previous is not None:
            # A trajectory's first step has no velocity before it and is Euler's.
            ratio = half_ratio(sigmas[i - 1], sigmas[i], sigmas[i + 1]) if i else 0.0
            half = to_device(((start[:n] < i).to(z.dtype) * ratio)[rows], z.device).view(-1, *(1,) * (z.dim() - 1))
            velocity = field(z[active], there[i].expand(len(z[active])), part).to(z.dtype)
            extrapolated = extrapolate(velocity, previous[active], half)
            previous[active], z[active] = velocity, z[active] + (there[i + 1] - there[i]) * extrapolated
        else:  # no field is defined at sigma 0
            own = "euler" if sigmas[i + 1] == 0 else solver
            z[active] = step(field, z[active], part, there[i], there[i + 1], own)
        row, k = reached[i + 1]
        if len(row):
            states[row, k] = z[row]
    result = torch.empty_like(states)
    result[order] = states
    return result


def rows_by_index(asked: torch.Tensor, last: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Finds where the indices asked are 0, 1, ..., last.

    Args:
        asked: int64 tensor [n, K] on the CPU, with entries in [0, last].
        last: The largest index.
        device: Where the result goes.

    Returns:
        For each index the (rows, columns), int64 tensors on the device, copied there at once.
    """
    flat = asked.flatten()
    order = to_device(flat.argsort(stable=True), device)
    sizes = flat.bincount(minlength=last + 1).tolist()
    k = asked.shape[1]
    return list(zip((order // k).split(sizes), (order % k).split(sizes), strict=True))


def rollout_by_route(
    fields: Sequence[Field],
    route: torch.Tensor,
    noise: torch.Tensor,
    conditioning: Conditioning,
    sigmas: torch.Tensor,
    until: torch.Tensor,
    solver: str = "euler",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rolls out each sample by its own field.

    Args:
        fields: The sources.
        route: int64 tensor [B] on the CPU, the number of each sample's field.
        noise, conditioning, sigmas, until, solver: As in `rollout`.

    Returns:
        The states [B, K, ...] in float32 and their sigmas [B, K].

    Raises:
        ValueError: As `rollout` does.
    """
    states = torch.empty(len(noise), until.shape[1], *noise.shape[1:], device=noise.device)
    for m, field in enumerate(fields):
        index = (route == m).nonzero()[:, 0]
        if len(index):
            there = to_device(index, noise.device)
            states[there], _ = rollout(field, noise[there], conditioning[index], sigmas, until[index], solver)
    return states, to_device(sigmas.cpu()[until], noise.device)


def sample(
    field: Field, noise: torch.Tensor, conditioning: Conditioning, sigmas: torch.Tensor, solver: str = "euler"
) -> torch.Tensor:
    """Draws finished samples: the end of the whole trajectory, noise [B, ...] -> data [B, ...].

    Args:
        field: The field to integrate.
        noise: Float tensor [B, ...].
        conditioning: What the B samples are conditioned on.
        sigmas: float32 tensor [N + 1] on the CPU, such as `sigma_grid` makes.
        solver: As in `rollout`.

    Returns:
        Float tensor [B, ...] in float32.

    Raises:
        ValueError: For an unknown solver.

    Example:
        >>> def to_one(latents, sigma, conditioning):  # the field of data that is one
        ...     return (latents - 1) / sigma[:, None]
        >>> sample(to_one, torch.randn(2, 3), Conditioning(torch.tensor([0, 1])), sigma_grid(8)).allclose(torch.ones(1))
        True
    """
    until = torch.full((len(noise), 1), len(sigmas) - 1)
    return rollout(field, noise, conditioning, sigmas, until, solver)[0][:, 0]
