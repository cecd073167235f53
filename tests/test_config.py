"""The configuration: every mistake named with its key and the nearest valid one."""

import pytest
import yaml

from danceopd.config import load_config, parse_config
from danceopd.errors import UserError

DEMO = "configs/demo.yaml"


def mistakes(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(DEMO, list(overrides))
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.max_step=4", ["training.max_step: unknown key", "'max_steps'"]),
        ("sources.t2i.weigths=x", ["sources.t2i.weigths: unknown key", "'weights'"]),
        ("capabilities.edit.data.wrld=edit", ["capabilities.edit.data.wrld: unknown key", "'world'"]),
        ("trainning.seed=1", ["trainning: unknown key", "'training'"]),
        ("query.bias=lowt", ["query.bias: 'lowt' is not valid", "'low_t'"]),
        ("rollout.solver=eular", ["rollout.solver", "'euler'"]),
        ("method=dancopd", ["method", "'danceopd'"]),
        ("training.max_steps=many", ["training.max_steps", "'many'"]),
        ("training.batch_size=-1", ["training.batch_size", "-1"]),
        ("training.learning_rate=.nan", ["training.learning_rate"]),
        ("capabilities.edit.weight=-2", ["capabilities.edit.weight", "-2"]),
        ("capabilities.edit.source=edti", ["capabilities.edit.source: no source 'edti'", "'edit'"]),
        ("capabilities.edit.task=t2i", ["capabilities.edit.task", "has source pictures"]),
        ("capabilities.t2i.task=edit", ["capabilities.t2i.task", "no source pictures"]),
        ("capabilities.t2i.data.manifest=a.jsonl", ["capabilities.t2i.data: give either world or manifest"]),
        ("training.gradient_accumulation_steps=5", ["5 does not divide batch_size 64"]),
        ("training", ["not of the form key.sub=value"]),
        ("training.seed.x=1", ["seed holds a value"]),
        ("training=3", ["training"]),
        ("sources={}", ["sources"]),
    ],
)
def test_a_mistake_is_named(override, says):
    message = mistakes(override)
    for part in says:
        assert part in message


def test_all_mistakes_come_at_once():
    message = mistakes("training.max_step=4", "query.bias=lowt", "training.batch_size=0")
    assert "3 mistakes" in message
    assert all(key in message for key in ("training.max_step", "query.bias", "training.batch_size"))


def test_overrides_are_typed():
    config = load_config(DEMO, ["training.learning_rate=1e-3", "training.max_steps=4", "rollout.solver=heun"])
    assert (config.training.learning_rate, config.training.max_steps) == (1e-3, 4)
    assert config.rollout.solver == "heun"


def test_round_trip_through_yaml():
    config = load_config(DEMO)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_missing_file_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean configs/demo\.yaml"):
        load_config("configs/dmo.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1", "", "\x00"])
def test_not_a_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(path)


def test_all_weights_zero():
    assert "all weights are zero" in mistakes("capabilities.t2i.weight=0", "capabilities.edit.weight=0")
