"""DeepSpeed's configuration as a user writes it."""

import json

import pytest

from danceopd.config.reading import load_config
from danceopd.support.errors import UserError
from danceopd.training.zero.settings import OURS, SECTIONS, for_ranks, read_deepspeed


def read(folder, settings):
    path = folder / "deepspeed.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return read_deepspeed(path)


def test_what_is_given_is_passed_on(tmp_path):
    settings = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6}, "wall_clock_breakdown": True}
    assert read(tmp_path, settings) == settings


@pytest.mark.parametrize("key", OURS)
def test_what_the_run_says_may_be_auto_and_nothing_else(tmp_path, key):
    zero = {"zero_optimization": {"stage": 3}}
    assert read(tmp_path, {**zero, key: "auto"}) == zero
    assert read(tmp_path, {**zero, key: {"enabled": "auto", "inner": {"size": "auto"}}}) == zero
    with pytest.raises(UserError, match=f"leave out {key}"):
        read(tmp_path, {**zero, key: 8})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimizaton": {"stage": 3}}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"aio": {"block_size": "auto"}, "zero_optimization": {"stage": "auto"}}, "aio.block_size, zero_optimization"),
        ({"zero_optimization": 3}, "zero_optimization must be an object"),
        ({"zero_optimization": [{"stage": 3}]}, "zero_optimization must be an object"),
        ({"zero_optimization": {"reduce_bucket_size": "large"}}, "reduce_bucket_size must be a number"),
        ({"zero_optimization": {"reduce_bucket_size": {"size": 1}}}, "reduce_bucket_size must be a number"),
        ({"zero_optimization": {"stage3_max_live_parameters": -1}}, "stage3_max_live_parameters must be a number"),
        ({"zero_optimization": {"stage3_max_live_parameters": 10**400}}, "stage3_max_live_parameters must be a"),
        ([1], "a JSON object"),
        ("{", "cannot read"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, said):
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path, settings)
    assert "deepspeed.json" in str(caught.value)


def test_what_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    shipped = read_deepspeed("configs/deepspeed/zero3.json")
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed("configs/deepspeed/zero3.json") == shipped
    with pytest.raises(UserError, match=r"did you mean 'configs/deepspeed/zero3.json'"):
        read_deepspeed("configs/deepspeed/zer3.json")
    (tmp_path / "zero3.json").write_text("{}")
    with pytest.raises(UserError, match=r"did you mean 'zero3\.json'") as caught:
        read_deepspeed("zer3.json")
    assert str(caught.value).count("did you mean") == 1


def test_deepspeed_reads_every_section_that_is_passed_on():
    """Each is looked for by DeepSpeed's own configuration, two of them by parts that list its keys."""
    config = pytest.importorskip("deepspeed.runtime.config")

    asked = set()

    class Watched(dict):
        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def __copy__(self):
            return self

    config.DeepSpeedConfig(Watched(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1))
    assert set(SECTIONS) - asked <= {"aio", "flops_profiler"}


def test_muon_gives_way_to_adamw_at_half_its_rate():
    demo = load_config("configs/demo.yaml")
    config, said = for_ranks(demo)
    assert (config.training.optimizer, config.training.learning_rate) == ("adamw", demo.training.learning_rate / 2)
    same = {"optimizer", "learning_rate"}
    assert config.training.model_dump(exclude=same) == demo.training.model_dump(exclude=same)
    assert "muon runs in one process" in said[0]
    assert f"{config.training.learning_rate:g}" in said[0]
    assert for_ranks(config) == (config, [])
