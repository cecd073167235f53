"""docs/operators.md: every configuration in it is read and passes the dry run, and its table counts what is counted."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from danceopd.api import examiner_of
from danceopd.config.expressions import evaluations
from danceopd.config.reading import parse_config
from danceopd.config.sections import OPERATORS
from danceopd.planning.counts import evaluations_per_step
from danceopd.planning.dry_run import dry_run

TEXT = Path("docs/operators.md").read_text(encoding="utf-8")
WHOLE, *SNIPPETS = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
SHOWN = {name: source for snippet in SNIPPETS for name, source in snippet["sources"].items()}


def config_of(source: str, tmp_path: Path, **changes):
    """The first configuration of the page with a source of one of the others."""
    own = {**WHOLE["capabilities"]["pictures"], "source": source}
    training = {**WHOLE["training"], "output_dir": str(tmp_path / "run")}
    sources = {**WHOLE["sources"], **SHOWN}
    return parse_config(
        {**WHOLE, "sources": sources, "capabilities": {"pictures": own}, "training": training, **changes}
    )


def test_every_operator_is_shown():
    assert {key for source in SHOWN.values() for key in source} == set(OPERATORS)
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == set(OPERATORS)
    headings = re.findall(r"^### (.*)$", TEXT, re.MULTILINE)
    assert {word for heading in headings for word in heading.split(" and ")} == set(OPERATORS)


@pytest.mark.parametrize("source", ["strong", *SHOWN])
def test_the_examples_pass_the_dry_run(source, tmp_path):
    config = config_of(source, tmp_path)
    plan = dry_run(config, examiner_of(config))
    assert plan.problems == []
    assert plan.evaluations["source"] > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "inside", "outside"),
    [
        ("strong", 2, 1),
        ("star", 2, 2),
        ("projected", 2, 2),
        ("skipped", 3, 2),
        ("sharp", 2, 1),
        ("half", 2, 2),
        ("both", 3, 3),
        ("warm", 3, 3),
        ("soft", 2, 2),
        ("layout", 1, 1),
        ("trigger", 2, 1),
    ],
)
def test_the_table_counts_what_is_counted(source, inside, outside, tmp_path):
    """Evaluations at noise level 0.6, which all intervals hold, and near data."""
    assert evaluations(config_of(source, tmp_path), source, torch.tensor([0.6, 0.05])).tolist() == [inside, outside]


def test_the_dry_run_says_what_a_source_is_made_of(tmp_path):
    config = config_of("trigger", tmp_path)
    said = dry_run(config, examiner_of(config)).text()
    assert "source trigger: teacher_at of strong; evaluations of a query: 1 to 2, by the noise level" in said
    assert "source both: compose of base, ink, oil; evaluations of a query: 3" in "\n".join(
        dry_run(config_of("both", tmp_path), examiner_of(config)).found
    )


def test_what_is_counted_is_the_mean_over_the_noise_levels_that_are_asked(tmp_path):
    config = config_of("strong", tmp_path, query={"bias": "uniform"}, rollout={"num_inference_steps": 4, "shift": 1.0})
    # Noise levels 1, 0.75, 0.5 and 0.25: guided at three of them.
    assert evaluations_per_step(config)["source"] == config.training.batch_size * (1 + 3 / 4)
    other = torch.tensor([1.0, 0.95, 0.9, 0.85, 0.0])
    assert evaluations_per_step(config, other)["source"] == config.training.batch_size
