"""training.base_precision: auto takes the first precision that fits the card, and a run keeps what it began with."""

import pytest
import torch
from model_runs import config_of

import danceopd.planning.dry_run as planning
import danceopd.tools.merge_loras.run as merging
from danceopd.api import distill
from danceopd.cli.parser import main
from danceopd.config.reading import parse_config
from danceopd.planning.dry_run import dry_run, with_memory_chosen
from danceopd.planning.memory import LEFT
from danceopd.planning.models import examine
from danceopd.support.cards import CARDS, Card
from danceopd.support.errors import UserError
from danceopd.tools.merge_loras.run import fitted
from danceopd.training.zero.settings import for_ranks

pytest.importorskip("torchao")  # int8

RUN = {"training.precision": "bf16", "training.batch_size": 4}


@pytest.fixture(scope="module")
def given(places, tmp_path_factory):
    root, folder = places("klein"), tmp_path_factory.mktemp("run")

    def config(precision, **changes):
        own = {"training.output_dir": str(folder), "training.base_precision": precision}
        return config_of(root, **RUN | own | changes)

    dry_run(config(None), examine)  # a process's first forward makes tables of positions, which stay
    return config


def card(memory: float, multiplies_fp8: bool) -> Card:
    return Card("made up", memory, 1e12, 1e9, 1e9, 1e9, 1e12, 2e12 if multiplies_fp8 else None)


@pytest.mark.parametrize("multiplies_fp8", [True, False])
def test_it_is_the_first_that_fits(given, multiplies_fp8):
    order = [None, "fp8" if multiplies_fp8 else "int8", "nf4"]
    sizes = [dry_run(given(precision), examine).total_memory() for precision in order]
    assert len(set(sizes)) == len(sizes)
    for room in (sizes[0], sizes[0] - 1, min(sizes) - 1):
        place = next((place for place, size in enumerate(sizes) if size <= room), sizes.index(min(sizes)))
        found = dry_run(given("auto"), examine, card(LEFT + room, multiplies_fp8))
        assert found.total_memory() == sizes[place]
        assert found.precision.startswith(f"training.base_precision: auto is {order[place] or 'bf16'}; ")


def test_blocks_wait_in_host_memory_only_where_none_fits(given):
    swapping = {"training.gradient_checkpointing": True, "training.swap_blocks": "auto"}
    sizes = {p: dry_run(given(p, **swapping), examine, CARDS["h200"]).total_memory() for p in (None, "fp8", "nf4")}
    found = dry_run(given("auto", **swapping), examine, card(LEFT + sizes["fp8"], True))
    assert (found.swap, found.total_memory()) == (None, sizes["fp8"])
    small = dry_run(given("auto", **swapping), examine, card(LEFT + sizes["nf4"] - 1, True))
    assert small.total_memory() + small.swap.spared == sizes["nf4"]


def test_without_a_card_the_base_stays_as_it_is(given, capsys):
    assert with_memory_chosen(given("auto"), examine).training.base_precision is None
    assert capsys.readouterr().out == "training.base_precision: auto is bf16\n"


def test_what_is_free_on_the_machines_card_decides(given, monkeypatch, capsys):
    room = dry_run(given("fp8"), examine).total_memory()
    monkeypatch.setattr(planning, "find_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(planning, "free_bytes", lambda device: LEFT + room)
    assert with_memory_chosen(given("auto"), examine).training.base_precision == "fp8"
    assert "auto is fp8; bf16 needs" in capsys.readouterr().out


def test_a_run_goes_on_with_what_it_began_with(given, tmp_path):
    changes = {"training.output_dir": str(tmp_path / "run"), "training.max_steps": 1}
    distill(given("nf4", **changes))
    on = given("auto", **changes | {"training.max_steps": 2})
    assert with_memory_chosen(on, examine).training.base_precision == "nf4"
    assert with_memory_chosen(on, examine, overwrite=True).training.base_precision is None
    distill(on)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 1
    with pytest.raises(UserError, match=r"another configuration \(training.base_precision\)"):
        distill(given(None, **changes | {"training.max_steps": 3}))


def test_a_merge_of_loras_narrows_its_base_where_nothing_else_is_left(given, tmp_path, monkeypatch):
    changes = {"training.output_dir": str(tmp_path / "run"), "training.max_steps": 1}
    least = {"training.gradient_checkpointing": True, "training.gradient_accumulation_steps": 4}
    wide, narrow = (dry_run(given(p, **changes | least), examine).total_memory() for p in (None, "fp8"))
    assert narrow < wide
    monkeypatch.setattr(merging, "find_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(planning, "find_device", lambda _: torch.device("meta"))
    room = {}
    for module in (merging, planning):
        monkeypatch.setattr(module, "free_bytes", lambda _: LEFT + room["now"])
    for room["now"], precision in ((wide, None), (narrow, "auto")):
        config, _, lines = fitted(given(None, **changes), [])
        assert config.training.base_precision == precision
        assert "warning" not in str(lines)
    assert lines[0].endswith("with training.base_precision=auto")
    assert fitted(given(None, **changes), ["training.base_precision=null"])[0].training.base_precision is None
    monkeypatch.undo()
    distill(given("fp8", **changes))  # a merge goes on as it began, also where there is more room
    assert fitted(given(None, **changes), [])[0].training.base_precision == "fp8"
    assert fitted(given(None, **changes), [], overwrite=True)[0].training.base_precision is None


def test_what_it_cannot_choose_for_is_refused(given, places):
    with pytest.raises(UserError, match="ranks must agree; give fp8, int8 or nf4"):
        for_ranks(given("auto"))
    values = given("auto").to_dict()
    values["training"]["rollout_precision"] = "fp8"
    with pytest.raises(UserError, match=r"training.rollout_precision: fp8, but an adapter's rollouts run as its base"):
        parse_config(values)
    with pytest.raises(UserError, match=r"training.base_precision: is for a model's"):
        parse_config({**parse_world(), "training": {"output_dir": "x", "base_precision": "auto"}})


def parse_world() -> dict:
    return {
        "student": {"init_from": "base"},
        "sources": {"one": {"weights": "base"}},
        "capabilities": {"draw": {"source": "one", "task": "t2i", "data": {"world": "t2i", "size": 4}}},
    }


def test_plan_says_it_for_a_card(given, tmp_path, capsys):
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(given("auto").to_dict()))
    assert main(["plan", "--config", str(path), "--card", "4090"]) == 0
    assert "training.base_precision: auto is bf16; bf16 needs 2" in capsys.readouterr().out
