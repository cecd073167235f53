"""One seed is one update of every method, at any size of its micro-batches and forwards and any number of ranks.

In float64, up to rounding: 1e-10 of the gradient's norm.
"""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import guided, within
from danceopd.core.methods import METHODS, needs
from danceopd.core.questions import matched
from danceopd.core.randomness import sample_generators
from danceopd.core.schedule import sigma_grid
from danceopd.training.rows import Rows, in_parts

B, WIDTH = 12, 5
EMPTY = torch.zeros(3, dtype=torch.float64)


class Network(torch.nn.Module):
    """A field in float64 that mixes a sample's entries, its noise level and its prompt."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH + 4, generator=generator, dtype=torch.float64) / 3)

    def forward(self, z, sigma, c):
        return torch.cat([z, sigma[:, None].to(z), c.prompt], 1).tanh() @ self.weight.mT


def batch_of(seed) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    noise, clean = (torch.randn(B, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    conditioning = Conditioning(torch.randn(B, 3, generator=generator, dtype=torch.float64), None, None)
    return Batch(noise, conditioning, torch.randint(3, (B,), generator=generator), clean)


def gradients(name, seed, parts=1, rows=B, ranks=1) -> dict[str, torch.Tensor]:
    """The summed gradient of each learner of one update."""
    student, fake = Network(0), Network(1)
    sources = [Network(2), guided(Network(3), EMPTY, 4.0), guided(Network(4), EMPTY, 1.5)]
    learners = {"student": student, "fake": fake}
    asked = [within(field, lambda network: in_parts(network, Rows(rows))) for field in (student, fake, *sources)]
    for rank in range(ranks):
        own = slice(B * rank // ranks, B * (rank + 1) // ranks)
        batch = batch_of(seed)[own]
        provide = {
            "sigmas": sigma_grid(6, 3.0),
            "shift": 3.0,
            "solver": "euler",
            "bias": "low_t",
            "k": 2,
            "gap": None,
            "progress": 1.0,
            "clean": batch.clean,
            "ema": asked[3],
            "anchor": asked[2],
            "fake": asked[1],
            "generator": sample_generators(seed, 1, list(range(B))[own]),
        }
        options = {"group_size": 3, "anchor_weight": 0.1} if name == "flow_opd" else {}
        method = METHODS[name](student) if inspect.isclass(METHODS[name]) else METHODS[name]
        with torch.no_grad():
            questions = method(asked[0], asked[2:], batch, **{key: provide[key] for key in needs(name)}, **options)
        for learner, q in (questions if isinstance(questions, dict) else {"student": questions}).items():
            for part in q.split(parts):
                (matched(learners[learner], part).loss.sum() / B).backward()
    return {key: network.weight.grad for key, network in learners.items() if network.weight.grad is not None}


@pytest.mark.parametrize("name", METHODS)
@given(seed=st.integers(0, 2**30), parts=st.integers(1, 30), rows=st.integers(1, B))
@settings(max_examples=5)
def test_parts_and_rows_do_not_change_an_update(name, seed, parts, rows):
    whole, cut = gradients(name, seed), gradients(name, seed, parts, rows)
    assert whole.keys() == cut.keys()
    for key, gradient in whole.items():
        assert (gradient - cut[key]).norm() < 1e-10 * gradient.norm()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not inspect.isclass(method)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_do_not_change_an_update(name, ranks):
    whole, shared = (gradients(name, 7, ranks=n)["student"] for n in (1, ranks))
    assert (whole - shared).norm() < 1e-10 * whole.norm()


def test_memory_that_runs_out_halves_the_rows_and_changes_nothing(capsys):
    """A network that fits three rows at a time: the forward is asked again in halves, and the run goes on so."""
    network, taken = Network(0), []

    def small(z, sigma, c):
        taken.append(len(z))
        if len(z) > 3:
            raise torch.OutOfMemoryError("no room")
        return network(z, sigma, c)

    rows, batch = Rows(B), batch_of(0)
    field = in_parts(small, rows)
    sigma = torch.linspace(0.1, 1, B, dtype=torch.float64)
    asked = (batch.noise, sigma, batch.conditioning)
    torch.testing.assert_close(field(*asked), network(*asked), rtol=1e-12, atol=1e-12)
    assert (taken, rows.rows) == ([12, 6, 3, 3, 3, 3], 3)
    assert capsys.readouterr().err.count("did not fit") == 2
    taken.clear()
    field(*asked)
    assert taken == [3, 3, 3, 3]


def test_one_row_that_does_not_fit_ends_it():
    def none(z, sigma, c):
        raise torch.OutOfMemoryError("no room")

    batch = batch_of(0)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        in_parts(none, Rows(1))(batch.noise, batch.noise[:, 0], batch.conditioning)
