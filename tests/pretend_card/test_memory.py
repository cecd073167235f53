"""What a run does on the pretend card where memory runs out: its graphs go first, and samples after them."""

import pytest
import torch
from card_runs import plain_kernels, trainer_on, world_config
from out_of_memory import Full
from pretend_card import pretend_card

from danceopd.training.rollouts.static import StaticField
from danceopd.world.build import build


def slow(*values):
    """Of make test-all: what another value covers in the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def graphs(trainer):
    return [graph for program in trainer.student.programs.values() for graph, _ in program.graphs.values()]


def network_of(trainer, phase):
    return trainer.parts.fields[0] if phase == "query" else trainer.parts.student


def records(config, phase=None, times=0, before=0):
    """(the records of two updates, the trainer): `phase` runs out of memory `times` times after `before` updates."""
    with plain_kernels(), pretend_card():
        trainer = trainer_on("card:0", config, build)
        found = []
        for step in range(2):
            if phase and step == before:
                network = network_of(trainer, phase)
                network.forward = Full(network.forward, "card:0", phase, times)
            found.append(trainer.update())
        return found, trainer


@pytest.fixture(scope="module")
def expected(networks, tmp_path_factory):
    """What the two updates are where memory suffices."""
    found, trainer = records(world_config(networks, tmp_path_factory.mktemp("plain")))
    assert graphs(trainer)
    return found


@pytest.mark.parametrize("phase", [slow("rollout"), "query", slow("match"), "backward"])
def test_graphs_go_and_the_samples_stay(networks, tmp_path, expected, phase, capsys):
    capsys.readouterr()
    found, trainer = records(world_config(networks, tmp_path), phase, 1)
    for record, other in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert record["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
    said = capsys.readouterr().err
    assert said.count("the run goes on without CUDA graphs: memory ran out") == 1
    assert "warning" not in said
    assert trainer.micro_batches == 1
    assert not graphs(trainer)


@pytest.mark.parametrize(
    ("phase", "less"), [("rollout", "did not fit; going on with"), ("match", "in 2 micro-batches")]
)
def test_samples_go_where_there_are_no_graphs_left(networks, tmp_path, expected, phase, less, capsys):
    found, _ = records(world_config(networks, tmp_path), phase, 2)
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-5)
    said = capsys.readouterr().err
    assert said.index("the run goes on without CUDA graphs") < said.index(less)


def test_a_match_that_does_not_fit_takes_the_memory_of_the_rollouts_graphs(networks, tmp_path):
    with plain_kernels(), pretend_card() as card:
        trainer = trainer_on("card:0", world_config(networks, tmp_path), build)
        trainer.update()
        (with_graphs, held), before = (graphs(trainer), card.module.allocated), trainer._with_gradient.passes
        assert with_graphs
        assert before
        del with_graphs
        trainer._with_gradient.passes.clear()  # so that it is captured again
        trainer.parts.student.forward = Full(trainer.parts.student.forward, "card:0", "match", 1)
        trainer.update()
        assert not graphs(trainer)
        assert trainer.micro_batches == 1
        assert card.module.allocated < held


def test_graphs_outlive_an_optimizers_step(networks, tmp_path):
    with plain_kernels(), pretend_card():
        trainer = trainer_on("card:0", world_config(networks, tmp_path), build)
        batch = trainer.draw()
        trainer.ask(batch)
        made = graphs(trainer)
        for parameter in trainer.engine.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        trainer.engine.step(0.01)
        trainer.ask(batch)
        assert made
        assert graphs(trainer) == made


def test_addresses_are_compared_once_a_rollout(networks, tmp_path, monkeypatch):
    compared = []
    plain = StaticField._check_addresses
    monkeypatch.setattr(StaticField, "_check_addresses", lambda self: compared.append(self.name) or plain(self))
    with plain_kernels(), pretend_card():
        trainer = trainer_on("card:0", world_config(networks, tmp_path), build)
        batch = trainer.draw()
        assert {True, False} == set(batch.conditioning.has_source.tolist())  # two layouts, each of several sizes
        trainer.ask(batch)
    assert len(graphs(trainer)) > 2
    assert compared.count("student") == 1
