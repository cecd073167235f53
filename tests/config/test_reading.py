"""The configuration: every mistake named with its key and the nearest valid one."""

import inspect

import pytest
import yaml

from danceopd.config.methods import options
from danceopd.config.reading import load_config, parse_config
from danceopd.core.methods import METHODS, PROVIDED, needs
from danceopd.support.errors import UserError

DEMO = "configs/demo.yaml"


ROLLOUT = ["rollout.num_inference_steps=16", "rollout.solver=euler"]  # the defaults, which not every method reads


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
    with pytest.raises(UserError, match=r"did you mean 'configs/demo\.yaml'"):
        load_config("configs/dmo.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1", "", "\x00"])
def test_not_a_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_config(path)


def test_all_weights_zero():
    assert "all weights are zero" in mistakes("capabilities.t2i.weight=0", "capabilities.edit.weight=0")


# Options of the methods

OF_THE_LOOP = sorted(PROVIDED)


@pytest.mark.parametrize(
    ("method", "override", "says"),
    [
        ("pooled", "options.visit=3", ["options.visit: unknown key", "'visits'"]),
        ("flow_opd", "options.groupsize=4", ["options.groupsize: unknown key", "'group_size'"]),
        ("danceopd", "options.visits=2", ["options.visits: unknown key", "objective"]),  # another method's
        ("pooled", "options.warm_start=0.5", ["options.warm_start: unknown key; valid are visits"]),
        ("joint", "options.visits=2", ["options.visits: unknown key; this method has none"]),
        ("dmd", "options.learning_rate=1", ["options.learning_rate: unknown key; this method has none"]),
        ("pooled", "options.visits=two", ["options.visits", "integer", "'two'"]),
        ("pooled", "options.visits=2.5", ["options.visits", "2.5"]),
        ("flow_opd", "options.noise_level=high", ["options.noise_level", "number", "'high'"]),
        ("flow_opd", "options.detach_advantage=maybe", ["options.detach_advantage", "boolean", "'maybe'"]),
        ("danceopd", "options.objective=msd", ["options.objective: 'msd' is not valid", "'mse'"]),
        ("danceopd", "options.routing=sotf", ["options.routing: 'sotf' is not valid", "'soft'"]),
        ("off_policy", "options.states_from=source", ["options.states_from: 'source' is not valid", "'sources'"]),
        ("danceopd", "options=3", ["options", "3"]),
    ],
)
def test_a_mistaken_option_is_named(method, override, says):
    message = mistakes(f"method={method}", override)
    for part in says:
        assert part in message


def test_mistaken_options_come_with_the_other_mistakes():
    message = mistakes("method=flow_opd", "options.x=1", "options.noise_level=a", "capabilities.edit.source=edti")
    assert "3 mistakes" in message
    assert all(key in message for key in ("options.x", "options.noise_level", "capabilities.edit.source"))


@pytest.mark.parametrize("method", METHODS)
def test_what_the_loop_provides_is_no_option(method):
    """Every keyword of a method is one or the other, and every option has a default of its declared type."""
    signature = inspect.signature(METHODS[method].__call__ if inspect.isclass(METHODS[method]) else METHODS[method])
    keywords = {key for key, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
    chosen = options(method).model_fields.keys()
    assert chosen.isdisjoint(PROVIDED)
    assert chosen | needs(method) == keywords
    defaults = load_config(DEMO, [f"method={method}", *ROLLOUT]).method_options()
    assert defaults.keys() == chosen
    assert options(method).model_validate(defaults, strict=True).model_dump() == defaults
    message = mistakes(f"method={method}", *(f"options.{key}=1" for key in OF_THE_LOOP))
    assert f"{len(PROVIDED)} mistakes" in message
    assert all(f"options.{key}: unknown key" in message for key in OF_THE_LOOP)


def test_options_are_typed_and_the_rest_keep_their_defaults():
    chosen = ["method=flow_opd", "options.noise_level=1", "options.group_size=4", "options.detach_advantage=false"]
    config = load_config(DEMO, [*chosen, *ROLLOUT])
    values = config.method_options()
    assert (values["noise_level"], values["group_size"], values["detach_advantage"]) == (1.0, 4, False)
    assert (values["max_advantage"], values["clip_range"], values["anchor_weight"]) == (5.0, 1e-4, 0.0)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


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


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("flow_opd", {"group_size": 1}, r"options\.group_size: .*greater than or equal to 2"),
        ("flow_opd", {"noise_level": 0}, r"options\.noise_level: .*greater than 0"),
        ("pooled", {"visits": 0}, r"options\.visits: .*greater than or equal to 1"),
        ("danceopd", {"warm_start": 1.5}, r"options\.warm_start: .*less than or equal to 1"),
    ],
)
def test_the_range_of_an_option_is_checked(method, options, message):
    with pytest.raises(UserError, match=message):
        load_config(DEMO, [f"method={method}", f"options={options}"])


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["method=joint", *ROLLOUT, "query.k=4"], "query.k"),
        (["method=diffusion_opd", "query.k=2"], "query.k"),
        (["method=sds", "query.k=2"], "query.k"),
        (["method=flow_opd", "rollout.solver=euler", "query.bias=uniform"], "query.bias"),
        (["method=off_policy", "query.bias=high_t"], "query.bias"),
        (["method=dmd", "query.bias=gap"], "query.bias"),
        (["method=consistency", "query.bias=gap"], "query.bias"),
        (["method=sds", "query.bias=gap"], "query.bias"),
        (["query.bias=gap"], "query.bias"),  # danceopd_fast
        (["method=joint", "rollout.num_inference_steps=16", "rollout.solver=heun"], "rollout.solver"),
        (["method=joint", "rollout.num_inference_steps=8", "rollout.solver=euler"], "rollout.num_inference_steps"),
        (["method=flow_opd", "rollout.solver=euler", "options.group_size=7"], "options.group_size"),
        (["capabilities.t2i.data.root=pictures"], "capabilities.t2i.data.root"),
        (["capabilities.t2i.data={manifest: a.jsonl, size: 5}"], "capabilities.t2i.data.size"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_an_option_that_would_not_be_read_is_refused(overrides, key):
    message = mistakes(*overrides)
    assert "has a mistake" in message
    assert f"  {key}: " in message


def test_every_key_of_rollout_and_query_is_read_by_the_methods_that_accept_it():
    """For each method and key: another value than the default is refused, or the method takes it by keyword."""
    changed = {("query", "bias"): "uniform", ("query", "k"): 3, ("rollout", "solver"): "heun"}
    keywords = {("query", "bias"): "bias", ("query", "k"): "k", ("rollout", "solver"): "solver"}
    for method in METHODS:
        for (section, key), value in changed.items():
            overrides = [f"method={method}", *ROLLOUT, f"{section}.{key}={value}"]
            if keywords[section, key] in needs(method):
                load_config(DEMO, overrides)
            else:
                assert f"{section}.{key}: " in mistakes(*overrides)
