"""The student's own trajectory: no gradient, and not a step that nobody looks at."""

from collections.abc import Sequence

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import Field
from danceopd.core.phase import phase

SOLVERS = ("euler", "heun", "ab2")


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
    """Integrate dz = v d sigma from noise and return the states at the trajectory indices asked.

    noise [B, ...] is the state at index 0, or at start [B] where given; sigmas [N + 1] float32 descend from 1;
    until [B, K] and start int64 in [0, N] lie on the CPU, so that no step waits for the device.
    Returns states [B, K, ...] in float32 and their sigmas [B, K]. A sample leaves the batch once its
    deepest index is reached, so the field is evaluated exactly sum(until.max(1) - start) times per sample in all
    (Heun: twice that, less one for each trajectory that ends at sigma 0). A StaticField takes static steps, captured
    on CUDA, and adds the padding that it counts.
    Raises ValueError for an unknown solver, an index outside the grid, or one before its start.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; use one of {', '.join(SOLVERS)}")
    if until.min() < 0 or until.max() >= len(sigmas):
        raise ValueError(f"trajectory indices must lie in [0, {len(sigmas) - 1}]")
    start = torch.zeros(len(until), dtype=torch.int64) if start is None else start
    if start.min() < 0 or (until < start[:, None]).any():
        raise ValueError("a trajectory cannot start after an index that is asked of it")
    own = getattr(field, "rollout", None)  # a field that has a rollout of its own
    if own is not None:
        states = own(noise, conditioning, sigmas, until, solver, start)
        if states is not None:
            return states, sigmas.to(noise.device)[until.to(noise.device)]
    depth, order = until.amax(1).sort(descending=True, stable=True)
    wanted, start = until[order], start[order]
    order, sigmas = order.to(noise.device), sigmas.to(noise.device)
    z, conditioning = noise[order].float(), conditioning[order]
    states = z[:, None].repeat(1, until.shape[1], *(1,) * (z.dim() - 1))
    previous = torch.zeros_like(z) if solver == "ab2" else None
    deeper = (depth > torch.arange(len(sigmas))[:, None]).sum(1).tolist()
    places, latest = reached(wanted, len(sigmas), z.device), int(start.max())
    for i in range(int(start.min()), int(depth[0])):
        n = deeper[i]  # the n deepest samples go on, those of them that have started
        late = i < latest and bool((start[:n] > i).any())
        if late and not (start[:n] <= i).any():
            continue
        active = (start[:n] <= i).nonzero()[:, 0].to(z.device) if late else slice(n)
        if solver == "ab2":
            # A trajectory's first step has no velocity before it and is Euler's.
            ratio = (sigmas[i + 1] - sigmas[i]) / (sigmas[i] - sigmas[i - 1]) if i else 0.0
            half = ((start[:n] < i).to(z) * ratio)[active].view(-1, *(1,) * (z.dim() - 1)) / 2
            velocity = field(z[active], sigmas[i].expand(len(z[active])), conditioning[active]).float()
            extrapolated = velocity + half * (velocity - previous[active])
            previous[active], z[active] = velocity, z[active] + (sigmas[i + 1] - sigmas[i]) * extrapolated
        else:
            z[active] = step(field, z[active], conditioning[active], sigmas[i], sigmas[i + 1], solver)
        row, k = places[i + 1]
        if len(row):
            states[row, k] = z[row]
    result = torch.empty_like(states)
    result[order] = states
    return result, sigmas[until.to(noise.device)]


def rollout_by_route(
    fields: Sequence[Field],
    route: torch.Tensor,
    noise: torch.Tensor,
    conditioning: Conditioning,
    sigmas: torch.Tensor,
    until: torch.Tensor,
    solver: str = "euler",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rollout` of each sample by its own field: route [B] int64 indexes `fields`."""
    states = torch.empty(len(noise), until.shape[1], *noise.shape[1:], device=noise.device)
    for m, field in enumerate(fields):
        index = (route == m).nonzero()[:, 0]
        if len(index):
            asked = until[index.to(until.device)]
            states[index], _ = rollout(field, noise[index], conditioning[index], sigmas, asked, solver)
    return states, sigmas.to(noise.device)[until.to(noise.device)]


def step(field, z, conditioning, sigma, next_sigma, solver="euler") -> torch.Tensor:
    """One step of the solver from noise level sigma to next_sigma (scalars): [B, ...] -> [B, ...]."""
    dt = next_sigma - sigma
    velocity = field(z, sigma.expand(len(z)), conditioning).float()
    if solver == "euler" or next_sigma == 0:  # no field is defined at sigma 0
        return z + dt * velocity
    end = field(z + dt * velocity, next_sigma.expand(len(z)), conditioning).float()
    return z + dt * (velocity + end) / 2


def sample(
    field: Field, noise: torch.Tensor, conditioning: Conditioning, sigmas: torch.Tensor, solver: str = "euler"
) -> torch.Tensor:
    """The end of the whole trajectory: noise [B, ...] -> data [B, ...]."""
    until = torch.full((len(noise), 1), len(sigmas) - 1)
    return rollout(field, noise, conditioning, sigmas, until, solver)[0][:, 0]


def reached(number: torch.Tensor, steps: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where number [n, K] int64 on the CPU is 0, 1, ..., steps: (rows, columns) of each, copied to the device once."""
    flat = number.flatten()
    order = flat.argsort(stable=True).to(device)
    sizes = flat.bincount(minlength=steps + 1).tolist()
    k = number.shape[1]
    return list(zip((order // k).split(sizes), (order % k).split(sizes), strict=True))
