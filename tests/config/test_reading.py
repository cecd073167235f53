"""Reading a configuration: overrides are typed, files that are none are named."""

import pytest
import yaml
from config_mistakes import DEMO

from danceopd.config.reading import load_config, parse_config
from danceopd.support.errors import UserError


def test_overrides_are_typed():
    config = load_config(DEMO, ["training.learning_rate=1e-3", "training.max_steps=4", "rollout.solver=heun"])
    assert (config.training.learning_rate, config.training.max_steps) == (1e-3, 4)
    assert config.rollout.solver == "heun"


def test_round_trip_through_yaml():
    config = load_config(DEMO)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_missing_file_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'configs/demo\.yaml'"):
        load_config("configs/dmo.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1", "", "\x00"])
def test_not_a_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(path)
