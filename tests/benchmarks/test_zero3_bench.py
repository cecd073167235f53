"""benchmarks/zero3_bench.py at a size where it takes seconds: what it counts is what was gathered."""

import json

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("deepspeed")
from benchmarks import zero3_bench as bench


def test_it_counts_the_output_of_every_kind_of_all_gather(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mine = torch.ones(10)
        with bench.Gathered() as gathered:
            dist.all_gather_into_tensor(torch.empty(10), mine)
            dist.all_gather([torch.empty(10)], mine)
            dist.all_reduce(mine)
        assert gathered.bytes == 80
        assert sum(gathered.calls.values()) == 2
        dist.all_gather_into_tensor(torch.empty(10), mine)
        assert gathered.bytes == 80  # outside
    finally:
        dist.destroy_process_group()


def test_a_plain_loop_gathers_six_times_as_much_and_learns_the_same(tmp_path, capsys):
    pytest.importorskip("diffusers")  # danceopd.models.lora_files
    file = tmp_path / "figures.json"
    argv = ["--only", "measured", "--rounds", "1", "--width", "128", "--depth", "2", "--student", "all weights"]
    bench.main([*argv, "--json", str(file)])
    (figures,) = json.loads(file.read_text())["students"]
    whole = 4 * figures["parameters"]["network"]
    plain, ours = (figures[name] for name in ("plain loop", "gather once"))
    assert 16 * whole < plain["gathered_bytes"] <= 18.5 * whole
    assert 2 * whole < ours["gathered_bytes"] <= 3.1 * whole
    rows = json.loads(file.read_text())["rows"]
    assert rows[1]["times_fewer_bytes"] == plain["gathered_bytes"] / ours["gathered_bytes"] > 5.5
    assert figures["largest_difference_of_losses"] < 1e-5
    assert len(set(plain["losses"])) == len(plain["losses"]) == 3
    assert "times fewer bytes" in capsys.readouterr().out


@pytest.mark.slow
def test_the_trainer_gathers_for_rollouts_once_an_update_in_however_many_micro_batches(tmp_path):
    pytest.importorskip("diffusers")
    file = tmp_path / "figures.json"
    bench.main(["--only", "trainer", "--rounds", "1", "--json", str(file)])
    found = {(way["rollouts_ask"], way["micro_batches"]): way for way in json.loads(file.read_text())["trainer"]}
    assert found.keys() == set(bench.WAYS)
    gathered = {way: figures["gathered_bytes"] for way, figures in found.items()}
    # Three more micro-batches are matched, at a forward and a backward each; nothing else is gathered again.
    matched = {ask: gathered[ask, 4] - gathered[ask, 1] for ask in ("replica", "shards")}
    assert matched["replica"] == pytest.approx(matched["shards"], rel=0.05)
    assert gathered["shards", 1] > 3 * gathered["replica", 1]
    assert [way["loss"] for way in found.values()] == pytest.approx([found["replica", 1]["loss"]] * 4, rel=1e-4)
