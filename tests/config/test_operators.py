"""Sources made of others in a configuration: what is refused and how it is said, and what is read of the rest."""

import json

import pytest
import torch
from config_mistakes import DEMO, mistakes

from danceopd.config.expressions import evaluations, outline, texts
from danceopd.config.reading import load_config

GUIDED = {"source": "t2i", "scale": 3.0}
INK = {"teacher_at": {"source": "t2i", "prompt": "ink"}}


def with_sources(**sources):
    return [f"sources.{name}={json.dumps(value)}" for name, value in sources.items()]


def read(**sources):
    return load_config(DEMO, with_sources(**sources))


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({"x": {"guided": {"source": "t2j", "scale": 2}}}, ["sources.x.guided.source: no source 't2j'", "'t2i'"]),
        ({"x": {"mean": ["t2i", "edt"]}}, ["sources.x.mean.1: no source 'edt'", "'edit'"]),
        ({"x": {"compose": {"base": "t2i", "sources": {"edti": 1}}}}, ["sources.x.compose.sources.edti", "'edit'"]),
        ({"x": {"by_sigma": {"above": "t2i", "below": "edi", "sigma": 0.5}}}, ["by_sigma.below: no source", "'edit'"]),
        ({"x": {"guided": {**GUIDED, "skale": 2}}}, ["sources.x.guided.skale: unknown key", "'scale'"]),
        ({"mean": {"guided": {**GUIDED, "skale": 2}}}, ["sources.mean.guided.skale: unknown key", "'scale'"]),
        ({"x": {"guidet": GUIDED}}, ["sources.x.guidet: unknown key", "'guided'"]),
        ({"x": {"guided": GUIDED, "mean": ["t2i", "edit"]}}, ["sources.x: guided and mean", "one operator"]),
        ({"x": {"guided": GUIDED, "weights": "t2i"}}, ["sources.x.weights: is for a network", "guided of others"]),
        ({"x": {"guided": GUIDED, "guidance_scale": 2}}, ["sources.x.guidance_scale: is for a network"]),
        ({"x": {"guided": {**GUIDED, "source": "x"}}}, ["sources.x: x -> x goes in a circle"]),
        (
            {"x": {"mean": ["t2i", "y"]}, "y": {"guided": {**GUIDED, "source": "z"}}, "z": {"mean": ["x", "edit"]}},
            ["sources.x: x -> y -> z -> x goes in a circle"],
        ),
        ({"x": {"guided": {"source": "t2i", "scale": 1}}}, ["sources.x.guided.scale: 1 is no guidance", "same as t2i"]),
        (
            {"x": {"guided": {**GUIDED, "scale": 1, "zero_star": True, "skip_layers": {"layers": [1], "scale": 2}}}},
            ["zero_star without effect"],
        ),
        (
            {"x": {"guided": {**GUIDED, "scale": 1, "interval": [0, 0.5], "skip_layers": {"layers": [1], "scale": 2}}}},
            ["interval without effect"],
        ),
        (
            {"x": {"guided": {**GUIDED, "skip_layers": {"layers": [1], "scale": 0}}}},
            ["guided.skip_layers.scale: 0 adds nothing"],
        ),
        ({"x": {"guided": {**GUIDED, "negative": "{prompt}"}}}, ["guided.negative: '{prompt}' is what t2i is asked"]),
        (
            {"x": {"guided": {"source": "y", "scale": 2, "negative": "ink"}}, "y": INK},
            ["sources.x.guided.negative: 'ink' is what y is asked with anyway"],
        ),
        ({"x": {"guided": {**GUIDED, "interval": [0, 0]}}}, ["guided.interval: ends at noise level 0"]),
        ({"x": {"teacher_at": {"source": "t2i", "prompt": "{prompt}"}}}, ["teacher_at.prompt: '{prompt}' is what t2i"]),
        ({"x": {"difference": {"base": "t2i", "source": "edit", "weight": 1}}}, ["weight: 1 is edit itself"]),
        (
            {"x": {"compose": {"base": "t2i", "sources": {"edit": 1}}}},
            ["compose.sources: weight 1 of one alone is edit"],
        ),
        ({"x": {"autoguided": {"source": "t2i", "weak": "edit", "scale": 0}}}, ["autoguided.scale: 0 is edit itself"]),
        ({"x": {"guided": {**GUIDED, "zero_star": True, "apg": {}}}}, ["guided.apg", "zero_star another"]),
        ({"x": {"guided": {**GUIDED, "apg": {"eta": 1}}}}, ["guided.apg: eta 1 without a norm is plain guidance"]),
        ({"x": {"guided": {**GUIDED, "interval": [0.8, 0.2]}}}, ["guided.interval", "lower noise level comes first"]),
        ({"x": {"guided": {**GUIDED, "interval": [0, 2]}}}, ["guided.interval.1"]),
        ({"x": {"guided": {**GUIDED, "negative": "a {promt"}}}, ["guided.negative", "a brace itself is doubled"]),
        ({"x": {"teacher_at": {"source": "t2i", "prompt": "{}"}}}, ["teacher_at.prompt", "is no column"]),
        ({"x": {"autoguided": {"source": "t2i", "weak": "t2i", "scale": 2}}}, ["leaves t2i as it is"]),
        ({"x": {"difference": {"base": "t2i", "source": "edit", "weight": 0}}}, ["leaves the base as it is"]),
        ({"x": {"compose": {"base": "t2i", "sources": {"edit": 0}}}}, ["compose.sources.edit: adds nothing to t2i"]),
        ({"x": {"slider": {"source": "t2i", "positive": "a", "negative": "a", "eta": 1}}}, ["leaves t2i as it is"]),
        ({"x": {"mean": ["t2i", "t2i"]}}, ["sources.x.mean: names a source twice"]),
        ({"x": {"mean": ["t2i"]}}, ["sources.x.mean"]),
        ({"x": {"by_sigma": {"above": "t2i", "below": "t2i", "sigma": 0.5}}}, ["one source above and below"]),
        (
            {
                "x": {"teacher_at": {"source": "t2i", "prompt": "ink"}},
                "y": {"teacher_at": {"source": "x", "prompt": "oil"}},
            },
            ["sources.y.teacher_at: it is asked with a text of its own already"],
        ),
        (
            {
                "x": {"mean": ["t2i", "edit"]},
                "y": {"guided": {"source": "x", "scale": 2, "skip_layers": {"layers": [1], "scale": 2}}},
            },
            ["sources.y.guided.skip_layers: blocks are of a network, but x is mean of others"],
        ),
    ],
)
def test_a_mistake_is_named(sources, says):
    message = mistakes(*with_sources(**sources))
    for part in says:
        assert part in message


def test_guidance_away_from_the_plain_prompt_is_guidance_of_what_hears_another():
    assert texts(read(y=INK, x={"guided": {"source": "y", "scale": 2, "negative": "{prompt}"}}), "x")


def test_a_source_keeps_its_own_text_inside_another():
    config = read(y=INK, both={"mean": ["y", "edit"]}, x={"teacher_at": {"source": "both", "prompt": "{german}"}})
    assert texts(config, "x") == ["ink", "{german}"]


def test_a_student_begins_as_a_network(tmp_path):
    changes = {"model": str(tmp_path), "student.init_from": "x", "sources.x": {"mean": ["t2i", "edit"]}}
    message = mistakes(*(f"{key}={json.dumps(value)}" for key, value in changes.items()))
    assert "student.init_from: x is mean of other sources and has no weights" in message


def model_mistakes(tmp_path, **sources):
    return mistakes(f"model={tmp_path}", *with_sources(**sources))


def test_differences_are_of_one_base(tmp_path):
    message = model_mistakes(
        tmp_path,
        plain={"weights": "base"},
        ink={"weights": "other", "lora": [{"path": "ink"}]},
        oil={"lora": [{"path": "oil"}], "embedded_guidance": 3.5},
        tuned={"weights": "tuned"},
        good={"lora": [{"path": "good"}]},
        x={"compose": {"base": "plain", "sources": {"ink": 1, "oil": 1, "tuned": 1, "good": 1}}},
        y={"difference": {"base": "strong", "source": "good", "weight": 2}},
        strong={"guided": {"source": "plain", "scale": 2}},
    )
    assert "sources.x.compose: ink is a LoRA on other, but the base plain is base" in message
    assert "sources.x.compose: oil is asked at embedded_guidance 3.5, but the base plain is not" in message
    assert message.count("sources.x.") == 2
    assert "sources.y" not in message


SOURCES = {
    "plain": {"weights": "t2i", "guidance_scale": 3.0},
    "strong": {"guided": {"source": "t2i", "scale": 4, "negative": "blurry", "interval": [0.2, 0.8]}},
    "apg": {"guided": {"source": "t2i", "scale": 4, "apg": {"norm": 2.5}, "rescale": 0.5}},
    "skip": {"guided": {"source": "t2i", "scale": 4, "skip_layers": {"layers": [1], "scale": 2, "interval": [0.5, 1]}}},
    "auto": {"autoguided": {"source": "t2i", "weak": "edit", "scale": 2}},
    "more": {"difference": {"base": "t2i", "source": "edit", "weight": 2}},
    "half": {"compose": {"base": "t2i", "sources": {"edit": 0.5, "plain": 0.5}}},
    "warm": {"slider": {"source": "t2i", "positive": "{prompt}, warm", "negative": "{prompt}, cold", "eta": 1}},
    "both": {"mean": ["t2i", "strong"]},
    "split": {"by_sigma": {"above": "edit", "below": "warm", "sigma": 0.5}},
    "own": {"teacher_at": {"source": "strong", "prompt": "in ink, {prompt}"}},
}


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "t2i": (1, 1, 1),
        "plain": (2, 2, 2),
        "strong": (1, 2, 1),
        "apg": (2, 2, 2),
        "skip": (3, 3, 2),
        "auto": (2, 2, 2),
        "more": (2, 2, 2),
        "half": (3, 3, 3),  # no base: the weights sum to 1
        "warm": (3, 3, 3),
        "both": (1, 2, 1),
        "split": (1, 1, 3),
        "own": (1, 2, 1),
    }.items(),
)
def test_evaluations_at_three_noise_levels(name, count):
    config = read(**SOURCES)
    assert tuple(evaluations(config, name, torch.tensor([1.0, 0.6, 0.1])).tolist()) == count


def test_the_texts_of_a_source():
    config = read(**SOURCES)
    found = {name: texts(config, name) for name in config.sources if texts(config, name)}
    assert found == {
        "strong": ["blurry"],
        "warm": ["{prompt}, warm", "{prompt}, cold"],
        "both": ["blurry"],
        "split": ["{prompt}, warm", "{prompt}, cold"],
        "own": ["in ink, {prompt}", "blurry"],
    }
    assert outline(config, "t2i").evaluations(torch.ones(2)).tolist() == [1, 1]


def test_networks_are_the_sources_that_are_no_operators():
    config = read(**SOURCES)
    assert list(config.networks()) == ["t2i", "edit", "plain"]
    assert {s.operator() for s in config.networks().values()} == {None}
