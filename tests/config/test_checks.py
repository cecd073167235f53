"""The configuration's mistakes: each named with its key and the nearest valid one, all at once."""

import pytest
from config_mistakes import mistakes


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
        ("training.seed=4294967296", ["training.seed: must be below 4294967296, found 4294967296"]),
        ("training.max_steps=abc", ["training.max_steps: must be a whole number, found 'abc'"]),
        ("training.learning_rate=-1", ["training.learning_rate: must be above 0, found -1"]),
        ("training.learning_rate=.inf", ["training.learning_rate: must be a number, and neither infinite nor nan"]),
        ("training.cuda_graphs=maybe", ["'maybe' is not valid; give auto, or true or false"]),
        ("training.trackers=wandb", ["training.trackers: must be a list, as in [a, b], found 'wandb'"]),
        ("sources=3", ["sources: must hold keys with values of their own, found 3"]),
        ("training.batch_size=64000000", ["training.batch_size", "at most 1000000"]),
        ("rollout.num_inference_steps=160000000", ["rollout.num_inference_steps", "at most 10000"]),
        ("evaluation.num_inference_steps=10001", ["evaluation.num_inference_steps", "at most 10000"]),
        (
            "training.swap_blocks=0",
            ["has a mistake", "swap_blocks: 0 is not valid; give auto, or a number above 0"],
        ),
        ("training.cuda_graphs=atuo", ["has a mistake", "cuda_graphs: 'atuo' is not valid; did you mean 'auto'?"]),
        ("student.lora.targets=3", ["targets: 3 is not valid; give attention, attention+ffn, all-linear, or a list"]),
        ("extend=base.yaml", ["extend: unknown key; did you mean 'extends'?"]),
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
        ("allow_distilled_base=true", ["allow_distilled_base: is for a model's"]),
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


def test_all_weights_zero():
    assert "all weights are zero" in mistakes("capabilities.t2i.weight=0", "capabilities.edit.weight=0")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("route=roundrobin", ["route: 'roundrobin' is not valid", "'round_robin'"]),
        ("rollout.solver=ab3", ["rollout.solver: 'ab3' is not valid", "'ab2'"]),
        ("query.bias=gaps", ["query.bias: 'gaps' is not valid", "'gap'"]),
        ("training.max_network_evaluations=0", ["training.max_network_evaluations", "0"]),
        ("capabilities.t2i.prompt_dropout=1", ["capabilities.t2i.prompt_dropout", "1"]),
        ("capabilities.t2i.prompt_dropout=-0.1", ["capabilities.t2i.prompt_dropout", "-0.1"]),
        ("evaluation.times=-1", ["evaluation.times", "-1"]),
    ],
)
def test_a_mistake_in_the_newer_keys_is_named(override, says):
    message = mistakes(override)
    for part in says:
        assert part in message
