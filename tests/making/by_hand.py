"""Fields and samples that can be worked out by hand, and one update of a method on them."""

import io
import itertools
from dataclasses import dataclass

import torch

from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning
from danceopd.core.questions import Questions, matched
from danceopd.core.schedule import sigma_grid

SIGMAS = sigma_grid(6, 3.0)
ROLLED = {"sigmas": SIGMAS, "solver": "euler", "bias": "mid_t"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def batch_of(n, routes=2, seed=0, size=3, first=0) -> Batch:
    """Samples whose only token is their number, counted from `first`; their routes in turn."""
    tokens = torch.arange(first, first + n)[:, None]
    conditioning = Conditioning(tokens, None, torch.zeros(n, dtype=torch.bool))
    return Batch(randn(n, size, seed=seed), conditioning, torch.arange(n) % routes, 2 + randn(n, size, seed=seed + 1))


def linear(theta):
    """A field of two parameters that differs from sample to sample."""
    return lambda z, sigma, c: theta[0] * z + theta[1] * sigma[:, None] + 0.1 * (c.prompt % 5)


def constant(value):
    return lambda z, sigma, c: torch.full_like(z, value)


def to_point(point):
    """The exact field of data that is this one point."""
    return lambda z, sigma, c: (z - point) / sigma[:, None]


STUDENT = linear(torch.tensor([0.8, -0.3]))
SOURCES = [linear(torch.tensor([0.2, 0.5])), linear(torch.tensor([-0.4, 0.1]))]


class Remembering:
    """A field that remembers what it was asked."""

    def __init__(self, field):
        self.field, self.calls = field, []

    def __call__(self, z, sigma, c):
        self.calls.append((z.detach().clone(), sigma.clone(), c.prompt[:, 0].clone(), torch.is_grad_enabled()))
        return self.field(z, sigma, c)


@dataclass
class Update:
    """One update of a method: each sample's loss with gradient, and its queries."""

    loss: torch.Tensor
    route: torch.Tensor
    depth: torch.Tensor | None
    states: torch.Tensor
    velocity: torch.Tensor
    target: torch.Tensor
    questions: Questions


def update(method, student, sources, batch, *, learner="student", trained=None, **keywords) -> Update:
    """Both phases: the method's questions without gradient, and the student matched with them."""
    with torch.no_grad():
        q = method(student, sources, batch, **keywords)
    q = q[learner] if isinstance(q, dict) else q
    velocities = []

    def remembered(*asked):
        velocities.append((trained or student)(*asked))
        return velocities[-1]

    loss = matched(remembered, q).loss
    each = loss.view(-1, max(1, len(loss) // len(batch))).sum(1)
    route = q.query_route().view(len(each), -1)[:, 0]
    return Update(each, route, q.depth, q.states, velocities[0].detach(), q.answers.target(), q)


def alone(field, batch, i, z, sigma):
    """The velocity of one sample of a batch at one state."""
    return field(z[None], torch.as_tensor(sigma)[None], batch.conditioning[i : i + 1])[0]


def euler(field, batch, i, sigmas):
    """Every state of one sample's trajectory, step by step."""
    states = [batch.noise[i]]
    for now, following in itertools.pairwise(sigmas):
        states.append(states[-1] + (following - now) * alone(field, batch, i, states[-1], now))
    return states


def close(a, b, rel=1e-4, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=atol, rtol=rel)


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
