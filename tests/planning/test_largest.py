"""What `danceopd plan` says is the largest that fits is what its own estimate of that configuration says."""

import pytest
from model_runs import config_of

from danceopd.cli.parser import main
from danceopd.planning.dry_run import dry_run
from danceopd.planning.largest import largest
from danceopd.planning.memory import LEFT
from danceopd.planning.models import examine

RUN = {"training.batch_size": 32, "training.gradient_accumulation_steps": 8, "training.rollout_batch_size": 1}


@pytest.fixture(scope="module")
def found(places, tmp_path_factory):
    root, folder = places("klein"), str(tmp_path_factory.mktemp("run"))

    def estimate(**changes):
        config = config_of(root, **RUN | {"training.output_dir": folder} | changes)
        return config, dry_run(config, examine)

    return estimate


def test_a_larger_rank_fills_the_card(found):
    config, findings = found()
    memory = LEFT + 1.1 * findings.total_memory()
    rank = largest(config, findings, memory).rank
    assert rank > config.student.lora.rank
    _, there = found(**{"student.lora.rank": rank, "student.lora.alpha": 1})
    assert there.total_memory() == pytest.approx(memory - LEFT, rel=0.02)


def test_more_samples_fill_the_card(found):
    config, findings = found()
    memory = LEFT + findings.total_memory() + 1.01 * 12 * findings.activations[0] / 4
    assert largest(config, findings, memory).samples == 16
    _, there = found(**{"training.gradient_accumulation_steps": 2})
    assert there.total_memory() == pytest.approx(memory - LEFT, rel=0.01)


def test_nothing_is_said_to_fit_a_card_that_is_too_small(found):
    config, findings = found()
    small = largest(config, findings, LEFT)
    assert (small.samples, small.resolution, small.rank) == (0, 0, 0)


def test_the_command_takes_a_card_by_its_short_name(places, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    import yaml

    values = config_of(places("klein"), **{"training.output_dir": str(tmp_path / "run")}).to_dict()
    path.write_text(yaml.safe_dump(values))
    assert main(["plan", "--config", str(path), "--card", "4090"]) == 0
    said = capsys.readouterr().out
    assert "1 x GeForce RTX 4090 24 GB" in said
    assert "largest that fits, each alone with the rest as configured: rank " in said


def test_no_rank_is_larger_than_what_changes_every_layer_in_full(found):
    config, findings = found()
    assert findings.warnings == []
    rank = largest(config, findings, 1e15).rank
    assert rank == findings.full_rank
    _, there = found(**{"student.lora.rank": rank + 1})
    assert there.warnings == [
        f"student.lora.rank: {rank + 1} is more than any layer has room for; {rank} changes each in full"
    ]
    assert largest(*found(**{"student.lora.rank": rank}), 1e15).rank == rank
