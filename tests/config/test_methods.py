"""Options of the methods: typed, within their range, and each mistake named."""

import inspect

import pytest
import yaml
from config_mistakes import DEMO, mistakes

from danceopd.config.methods import options
from danceopd.config.reading import load_config, parse_config
from danceopd.core.methods import METHODS, PROVIDED, needs
from danceopd.support.errors import UserError

ROLLOUT = ["rollout.num_inference_steps=16", "rollout.solver=euler"]  # the defaults, which not every method reads


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
        ("pooled", "options.visits=two", ["options.visits", "whole number", "'two'"]),
        ("pooled", "options.visits=2.5", ["options.visits", "2.5"]),
        ("flow_opd", "options.noise_level=high", ["options.noise_level", "number", "'high'"]),
        ("flow_opd", "options.detach_advantage=maybe", ["options.detach_advantage", "true or false", "'maybe'"]),
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
    ("method", "options", "message"),
    [
        ("flow_opd", {"group_size": 1}, r"options\.group_size: .*at least 2"),
        ("flow_opd", {"noise_level": 0}, r"options\.noise_level: .*above 0"),
        ("pooled", {"visits": 0}, r"options\.visits: .*at least 1"),
        ("danceopd", {"warm_start": 1.5}, r"options\.warm_start: .*at most 1"),
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
