"""What the meta device is asked twice is what it gives each time, and what has values is computed."""

import pytest
import torch
import torch.nn.functional as F

from danceopd.models.footprint import most_alive, storage_number
from danceopd.planning.remembered import Remembered


def gradient_of_a_norm(x):
    given = x.clone().requires_grad_(True)
    return torch.autograd.grad(F.layer_norm(given, (6,)).sum(), given)[0]


# Each of x [4, 6] in float32 on the meta device; an int64 tensor tells a number's kind.
OPERATIONS = {
    "sum": lambda x: x + x.new_empty(6),
    "number": lambda x: x.long() * 2,
    "another number": lambda x: x.long() * 2.0,
    "truth": lambda x: x.long() * True,
    "dtype": lambda x: x.to(torch.bfloat16),
    "product": lambda x: x @ x.mT,
    "of a transposed one": lambda x: x.mT.sigmoid(),
    "concatenated": lambda x: torch.cat([x, x.new_empty(2, 6)]),
    "several": lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[1],
    "some are none": gradient_of_a_norm,
    "view": lambda x: x.view(3, 8)[1:],
    "the same": lambda x: x.contiguous(),
    "in place": lambda x: x.add_(1),
    "into another": lambda x: torch.add(x, 1, out=x.new_empty(4, 6)),
    "part": lambda x: x.chunk(2)[1],
}


def form(operation, x):
    out = operation(x)
    return out.shape, out.stride(), out.dtype, out.storage_offset(), storage_number(out) == storage_number(x)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_same_again(name):
    wanted = form(OPERATIONS[name], torch.empty(4, 6, device="meta"))
    with Remembered():
        for operation in OPERATIONS.values():  # alike ones first
            form(operation, torch.empty(4, 6, device="meta"))
        assert form(OPERATIONS[name], torch.empty(4, 6, device="meta")) == wanted


def test_what_has_values_is_computed_each_time():
    with Remembered():
        for value in (1.0, 2.0):
            mask = torch.tensor([True, False, True])
            assert (torch.full((3,), value)[mask] + 1).tolist() == [value + 1] * 2


def test_memory_is_new_each_time():
    x, kept = torch.empty(100, device="meta"), []
    with Remembered():
        assert most_alive(lambda: kept.extend(x * 2 for _ in range(5))) == 5 * 400


def test_what_a_graph_keeps_goes_in_the_backward():
    x = torch.empty(1000, device="meta", requires_grad=True)

    def update():
        doubled = x * 2
        y = doubled.sigmoid()  # and both are there; the graph keeps y
        del doubled
        total = y.sum()
        del y
        total.backward()  # y and the gradient of 2 x, which goes as that of x comes

    plain = most_alive(update)
    assert 2 * 4000 <= plain <= 2 * 4000 + 3 * 4  # and the sum and its gradient
    x.grad = None
    with Remembered():
        assert most_alive(update) == plain
