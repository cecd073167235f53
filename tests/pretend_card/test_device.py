"""The pretend card itself: what CUDA's tensors refuse, what its host waits for, and what its graphs read."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from pretend_card import CardTensor, HostWait, WrongSide, pretend_card
from pretend_graphs import GraphFault, Race

from danceopd.core.copies import to_device


@pytest.fixture
def card():
    with pretend_card() as card:
        yield card


def there(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="card")


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "index of the host": lambda x: x[torch.tensor([0])],
    "tensor of host data": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copy that blocks": lambda x: torch.ones(3).to(x.device),
    "copy from plain memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "copy in place": lambda x: x.copy_(torch.ones(4, 4)),
    "synchronize": lambda x: torch.card.synchronize(),
}
FREE = {
    "index": lambda x: x[torch.arange(2, device="card")],
    "slice": lambda x: x[1:, :2],
    "fill": lambda x: x[0].fill_(2.0),
    "number": lambda x: x * 2 + torch.tensor(3.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "pinned": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "norm": lambda x: x.norm() / x.square().mean().sqrt(),
    "sort": lambda x: x.sort(0),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_the_host_waits_for_is_noted_with_its_line(card, name):
    WAITS[name](there(4, 4))
    assert len(card.waits) == 1
    assert card.waits[0].line.startswith("tests/pretend_card/test_device.py:")
    with card.no_waits(), pytest.raises(HostWait, match=r"test_device\.py:\d+"):
        WAITS[name](there(4, 4))


@pytest.mark.parametrize("name", FREE)
def test_what_runs_on_is_not(card, name):
    with card.no_waits():
        FREE[name](there(4, 4))


MEETINGS = {
    "add": lambda x: x + torch.ones(4, 4),
    "product": lambda x: F.linear(x, torch.ones(2, 4)),
    "concatenation": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "values": lambda x: x.index_copy_(0, torch.arange(1, device="card"), torch.ones(1, 4)),
    "generator": lambda x: x.normal_(generator=torch.Generator()),
    "numpy": lambda x: x.numpy(),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_tensors_of_both_sides_do_not_meet(card, name):
    with pytest.raises(WrongSide, match=r"test_device\.py:\d+"):
        MEETINGS[name](there(4, 4))


def test_an_expanded_tensor_cannot_be_pinned_as_it_is(card):
    """As torch's pin_memory, which copies into the same strides; `to_device` takes it apart."""
    rows = torch.arange(3).expand(2, 3)
    with pytest.raises(RuntimeError, match="cannot be pinned"):
        rows.pin_memory()
    assert torch.equal(to_device(rows, "card").cpu(), rows)


def test_a_network_trains_as_on_the_cpu(card):
    """Forward, backward, clipping, the optimizer: bit for bit."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.SiLU(), torch.nn.Linear(16, 8))
    moved, x, losses = copy.deepcopy(plain).to("card"), torch.randn(5, 8), []
    for network, device in ((plain, "cpu"), (moved, "card")):
        optimizer, z = torch.optim.AdamW(network.parameters(), lr=1e-2), x.to(device)
        for _ in range(3):
            loss = (network(z) - z).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[:3] == losses[3:]
    assert all(torch.equal(p, q.cpu()) for p, q in zip(plain.parameters(), moved.parameters(), strict=True))
    back = copy.deepcopy(moved).to("cpu")
    assert all(type(p.data) is torch.Tensor for p in back.parameters())


def test_data_that_is_set_is_the_other_tensors_memory(card):
    """As DeepSpeed does, whose parameters are views of one flat tensor."""
    card.follows_data = True
    parameter, flat = torch.nn.Parameter(there(3)), there(6)
    parameter.data = flat.narrow(0, 2, 3).data
    flat.fill_(2.0)
    assert torch.equal((parameter * 1).detach().cpu(), torch.full((3,), 2.0))


def test_autocast_follows_cudas_lists(card):
    x, layer = there(2, 8), torch.nn.Linear(8, 8).to("card")
    with torch.autocast("card", torch.bfloat16):
        narrow = layer(x)
        assert narrow.dtype == torch.bfloat16
        assert F.layer_norm(narrow, (8,)).dtype == torch.float32
        assert (narrow @ narrow.mT).dtype == torch.bfloat16
        assert narrow.softmax(-1).dtype == torch.float32
    assert layer(x).dtype == torch.float32


def test_memory_is_counted_until_its_last_view_is_gone(card):
    gc.collect()
    before = torch.card.memory_allocated()
    x = there(256, 4)
    view = x[:1]
    assert torch.card.memory_allocated() == before + 4096
    del x
    assert torch.card.memory_allocated() == before + 4096
    del view
    assert torch.card.memory_allocated() == before
    assert torch.card.max_memory_allocated() >= before + 4096
    free, total = torch.card.mem_get_info()
    assert free == total - before


def test_a_shape_that_is_changed_in_place_is_changed_on_both_sides(card):
    x, row = there(4, 3), there(4)
    assert (row @ x).shape == (3,)  # a product of one row, which torch squeezes in place
    assert torch.equal((row @ x).cpu(), row.cpu() @ x.cpu())
    assert x.t_().shape == (3, 4)


def test_the_card_has_a_generator_of_its_own(card):
    torch.manual_seed(3)
    first, state = there(4), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(there(4).cpu(), first.cpu())


def test_a_stream_waits_for_another(card):
    x, stream = there(4), torch.card.Stream()
    with torch.card.stream(stream), pytest.raises(Race):
        x + 1
    stream.wait_stream(torch.card.current_stream())
    with torch.card.stream(stream):
        y = x + 1
    with pytest.raises(Race):
        y * 2
    torch.card.current_stream().wait_stream(stream)
    assert torch.equal((y * 2).cpu(), (x.cpu() + 1) * 2)


def captured(step, pool=None):
    graph = torch.card.CUDAGraph()
    with torch.card.graph(graph, pool=pool, stream=torch.card.current_stream()):
        step()
    return graph


def test_a_graph_replays_at_the_same_addresses(card):
    z, weight, out = there(3), there(3), torch.zeros(3, device="card")
    start = z.cpu()

    def step():
        z.add_(weight * 2)
        out.copy_(z)

    graph = captured(step)
    assert torch.equal(z.cpu(), start)  # a capture computes nothing
    graph.replay()
    graph.replay()
    assert torch.equal(out.cpu(), start + weight.cpu() * 2 + weight.cpu() * 2)
    weight.zero_()
    graph.replay()
    assert torch.equal(out.cpu(), z.cpu())


def test_a_graph_whose_weight_is_gone_says_so(card):
    z, weight = there(3), there(3)
    graph = captured(lambda: z.add_(weight))
    weight = there(3)  # another, as where an optimizer or a loader puts a new tensor in its place
    with pytest.raises(GraphFault, match=r"memory that is gone: torch.float32 \[3\]"):
        graph.replay()


@pytest.mark.parametrize("name", ["item", "tensor of host data", "nonzero", "copy that blocks"])
def test_a_capture_refuses_what_waits(card, name):
    x = there(4, 4)
    with pytest.raises(HostWait, match="in a capture"):
        captured(lambda: WAITS[name](x))


def test_a_graph_holds_its_pool(card):
    x = there(256)
    gc.collect()
    before = torch.card.memory_allocated()
    graph = captured(lambda: x.add_(x * 2))
    gc.collect()
    assert torch.card.memory_allocated() == before + 1024
    del graph
    gc.collect()
    assert torch.card.memory_allocated() == before


def test_graphs_of_a_pool_take_turns(card):
    """A forward, its backward, and another graph that was captured when nobody held what the forward saves."""
    x, out, gradient, aside = there(3).requires_grad_(), there(3), there(3), there(3)
    pool = torch.card.graph_pool_handle()
    kept = []

    def forward():
        kept.append((x.exp() * x).exp())
        out.copy_(kept[0].detach())

    first = captured(forward, pool)
    second = captured(lambda: gradient.copy_(*torch.autograd.grad(kept[0].sum(), x)), pool)
    kept.clear()
    gc.collect()
    third = captured(lambda: aside.mul_(2).add_(aside.exp()), pool)
    expected = x.detach().cpu().requires_grad_()
    (expected.exp() * expected).exp().sum().backward()
    for order in ((first, second), (third, first, second)):
        for graph in order:
            graph.replay()
        torch.testing.assert_close(gradient.cpu(), expected.grad)
    for graph in (first, third, second):
        graph.replay()
    assert gradient.cpu().isnan().any()
    assert not out.cpu().isnan().any()


def test_without_a_card_there_is_none():
    with pretend_card():
        assert torch.accelerator.is_available()
        x = there(2)
        assert isinstance(x, CardTensor)
    assert not torch.accelerator.is_available()
