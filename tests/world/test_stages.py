"""A stage's training: it goes on exactly where it was killed, and only by the schedule that it began with."""

import pytest
import torch
from torch import nn

from danceopd.support.errors import UserError
from danceopd.world import stages
from danceopd.world.stages import generator_of, run_stage


def trained(folder, killed_at=None, **changed):
    """Trains a small network for six updates; returns its average's weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def loss(step):
        if step == killed_at:
            raise KeyboardInterrupt
        return model(torch.randn(8, 4, generator=generator_of(0, step))).square().mean()

    how = {"steps": 6, "learning_rate": 1e-2, "decay": 0.5, **changed}
    return run_stage(folder, "one", model, loss, matrices=lambda *_: True, **how).state_dict()


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """The folder of a training that was killed after three updates."""
    monkeypatch.setattr(stages, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, killed_at=3)
    return tmp_path


def test_a_killed_stage_goes_on_to_the_same_weights(killed, tmp_path_factory):
    whole, resumed = trained(tmp_path_factory.mktemp("whole")), trained(killed)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize("changed", [{"steps": 9}, {"learning_rate": 2e-2}, {"decay": 0.1}])
def test_a_stage_does_not_go_on_by_another_schedule(killed, changed):
    with pytest.raises(UserError, match=r"one\.pt is of a training with steps 6, .* remove it to train from the start"):
        trained(killed, **changed)


def test_a_finished_stage_is_not_lengthened(tmp_path):
    trained(tmp_path)
    with pytest.raises(UserError, match="cannot go on with steps 9"):
        trained(tmp_path, steps=9)


def test_a_state_that_does_not_say_its_schedule_is_refused(killed):
    state = torch.load(killed / "one.pt", weights_only=True)
    for key in ("steps", "learning_rate", "decay"):
        del state[key]
    torch.save(state, killed / "one.pt")
    with pytest.raises(UserError, match="remove it to train from the start"):
        trained(killed)
