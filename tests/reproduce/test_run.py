"""`danceopd reproduce`: the matrix, runs in processes of their own, resume after a kill, and the results files."""

import fcntl
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from danceopd.cli.parser import main
from danceopd.reproduce import run as driver
from danceopd.reproduce.matrix import (
    ABLATIONS,
    BUDGETS,
    DRAWN_EVALUATIONS,
    DRAWN_STEPS,
    GRID,
    LEARNING_RATES,
    MERGE_COUNTS,
    MERGE_DRAWN,
    MERGE_METHODS,
    METHODS,
    MINIATURE,
    MINIATURE_GRID,
    MINIATURE_RATES,
    SETTINGS,
    Budget,
    runs,
)
from danceopd.reproduce.run import Folders, adopt, chosen, config_of, digest, finished, gather, reproduce
from danceopd.support.errors import UserError
from danceopd.support.run_log import read_log
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.files import save_model

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = Budget("quick", main=1500, short=1500, ablation=1500, miniature=1500, merge=1500, seeds=1)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The settings' files with tiny networks and a few pictures."""
    folder = tmp_path_factory.mktemp("configs")
    for seed, name in enumerate(("base", "t2i", "edit", "local", "global", "style")):
        torch.manual_seed(seed)
        network = DiT(DiTConfig(width=32, depth=1, heads=2, mlp_ratio=2))
        torch.nn.init.normal_(network.patch_out.weight, std=0.05)
        save_model(network, folder / f"{name}.safetensors")
    for path in CONFIGS.glob("setting_*.yaml"):
        raw = yaml.safe_load(path.read_text())
        for source in (*raw["sources"].values(), raw["student"]):
            for key in ("weights", "init_from"):
                if source.get(key) and not source[key].endswith(".safetensors"):
                    source[key] = str(folder / f"{source[key]}.safetensors")
        raw["evaluation"] |= {"per_task": 2, "per_kind": 2, "quick": 1, "times": 1, "num_inference_steps": 2}
        (folder / path.name).write_text(yaml.safe_dump(raw, sort_keys=False))
    return folder


def place_of(configs, tmp_path):
    return Folders(configs, tmp_path / "work", tmp_path / "results")


def test_every_run_of_the_matrix_is_a_valid_configuration(tmp_path):
    folders = place_of(CONFIGS, tmp_path)
    for setting in set(SETTINGS) - {"merge"}:  # which merge_loras configures
        made = runs(setting, BUDGETS["paper"], 3)
        names = [run.name for run in made]
        assert len(set(names)) == len(names)
        for run in made:
            config = config_of(run, folders)
            assert config.training.seed == run.seed
            assert config.training.max_network_evaluations == run.overrides["training.max_network_evaluations"]


def test_methods_of_one_table_have_one_budget_and_each_its_rate():
    for setting in "AB":
        made = runs(setting, BUDGETS["paper"], 3)
        assert {run.row for run in made} == METHODS.keys()
        assert {run.overrides["training.max_network_evaluations"] for run in made} == {BUDGETS["paper"].main}
        assert all(run.overrides["training.learning_rate"] == LEARNING_RATES[run.row] for run in made)
        assert all(sum(r.row == run.row for r in made) == 3 for run in made)
    grid = runs("grid", BUDGETS["paper"], 3)
    assert {f"{m}@{r:g}" for m in METHODS for r in GRID} <= {run.row for run in grid}
    assert {run.seed for run in grid} == {0}


def test_each_number_of_loras_is_merged_at_one_budget():
    made = runs("merge", BUDGETS["paper"], 3)
    drawn = {"joint_samples": MERGE_DRAWN * DRAWN_STEPS}
    trained = [run for run in made if run.overrides["method"] != "untrained"]
    assert {(run.overrides["method"], run.overrides["loras"], run.seed) for run in trained} == set(
        itertools.product(MERGE_METHODS, MERGE_COUNTS, range(3))
    )
    assert {run.evaluations + drawn.get(run.overrides["method"], 0) for run in trained} == {BUDGETS["paper"].merge}


def test_runs_on_the_miniature_have_one_budget_which_the_drawing_of_data_is_part_of():
    made = runs("miniature", BUDGETS["paper"], 3)
    assert {run.row for run in made} == MINIATURE.keys()
    drawn = {"joint_samples": DRAWN_EVALUATIONS}
    assert {run.evaluations + drawn.get(run.row, 0) for run in made} == {BUDGETS["paper"].miniature}
    assert all(run.overrides["training.learning_rate"] == MINIATURE_RATES[run.row] for run in made)
    grid = runs("miniature_grid", BUDGETS["paper"], 3)
    assert {run.row for run in grid} == {f"{row}@{rate:g}" for row, rates in MINIATURE_GRID.items() for rate in rates}
    assert all(run.on_miniature and run.seed == 0 for run in grid)


def test_the_ablations_hold_what_the_paper_varies():
    rows = [row for axis in ABLATIONS.values() for row in axis]
    assert len(set(rows)) == len(rows)
    wanted = "soft mid_t high_t uniform k4 k16 steps16 steps20 steps28"
    losses = "kl dmd sds consistency sigma_sqrt logit_normal mode cosmap"
    assert {*wanted.split(), *losses.split()} <= set(rows)


def test_a_run_is_named_by_what_it_computes(configs, tmp_path):
    one, two = place_of(configs, tmp_path / "one"), place_of(configs, tmp_path / "two")
    a, b = runs("A", TINY, 1)[:2]
    assert digest(a, one) == digest(a, two)
    assert digest(a, one) != digest(b, one)
    assert digest(a, one) != digest(runs("A", BUDGETS["paper"], 1)[0], one)


def test_quick_setting_a_end_to_end_and_again(configs, tmp_path, capsys):
    folders = place_of(configs, tmp_path)
    written = reproduce(["A"], TINY, folders, seeds=1, workers=2)
    assert folders.results / "REPORT.md" in written
    table = json.loads((folders.results / "A.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    trained = {name for name, row in rows.items() if row["kind"] == "trained"}
    assert trained == {"joint", "off_policy", "diffusion_opd", "flow_opd", "danceopd"}
    assert {"base", "source_t2i", "source_edit", "weight_merge", "merge_lora_ties"} <= rows.keys()
    for name in trained:
        row = rows[name]
        assert row["network_evaluations"] >= 1500
        assert row["seeds"] == [0]
        assert row["commit"]
        assert row["seconds"] > 0
        assert 0 <= row["geneval_overall"]["mean"] <= 1
        assert 0 <= row["gedit_average"]["mean"] <= 10
        assert row["curve"][0][0] == 0
        assert row["curve"][-1][0] >= 1500
    assert not list(folders.work.glob("A/*/seed0/checkpoints/*"))
    before = {p: p.stat().st_mtime_ns for p in folders.work.glob("A/*/seed0/result.json")}
    reproduce(["A"], TINY, folders, seeds=1, workers=2)
    assert "finished already" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in folders.work.glob("A/*/seed0/result.json")}

    # The results file alone is enough to take a finished run over; another budget's is not taken.
    elsewhere = Folders(configs, tmp_path / "elsewhere", folders.results)
    made = runs("A", TINY, 1)
    adopt(made, elsewhere)
    assert all(finished(run, elsewhere) == finished(run, folders) for run in made)
    adopt(runs("A", BUDGETS["paper"], 1), Folders(configs, tmp_path / "third", folders.results))
    assert not list((tmp_path / "third").glob("**/result.json"))


def test_merges_that_need_no_training_are_taken_over_from_the_results_file(tmp_path):
    shares = {"shares": {"": 0.5, "night": 0.25}, "rank": 8}
    methods = {"base": {"kept": 0.2, "base_kept": 1.0, "pairs": 0.0, **shares}}
    methods["merge_ties"] = {**methods["base"], "kept": 0.4, "chosen": 0.8}
    folders = Folders(CONFIGS, tmp_path / "work", tmp_path / "results")
    folders.results.mkdir()
    made = [run for run in runs("merge", TINY, 2) if run.row == "untrained_4"]
    for run in made:
        result = {"seed": run.seed, "digest": digest(run, folders), "methods": methods, "commit": "c"}
        path = folders.work / run.name / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result))
    gather("merge", TINY, folders, 2)
    before = (folders.results / "merge.json").read_text()
    assert [(row["method"], row["loras"], row["seeds"]) for row in json.loads(before)["rows"]] == [
        ("base", 4, [0, 1]),
        ("merge_ties", 4, [0, 1]),
    ]
    elsewhere = Folders(CONFIGS, tmp_path / "elsewhere", folders.results)
    adopt(made, elsewhere)
    assert all(finished(run, elsewhere) for run in made)
    gather("merge", TINY, elsewhere, 2)
    assert (folders.results / "merge.json").read_text() == before


def test_means_and_errors_over_seeds(configs, tmp_path):
    folders = place_of(configs, tmp_path)
    values = {0: 0.5, 1: 0.6, 2: 0.9}
    for run in runs("ablations", TINY, 3):
        if run.row not in ("danceopd", "k4") or (run.row, run.seed) == ("k4", 2):
            continue
        result = {
            "seed": run.seed,
            "digest": digest(run, folders),
            "geneval_overall": values[run.seed],
            "geneval_overall_error": 0.1,
            "network_evaluations": 10 + run.seed,
            "updates": 3,
            "seconds": 1.0,
            "curve": [[0, run.seed, 1], [5, run.seed, 2]],
            "commit": "abc",
        }
        (folders.work / run.name).mkdir(parents=True)
        (folders.work / run.name / "result.json").write_text(json.dumps(result))
    gather("ablations", TINY, folders, 3)
    rows = {row["method"]: row for row in json.loads((folders.results / "ablations.json").read_text())["rows"]}
    assert rows.keys() == {"danceopd", "k4"}
    score = rows["danceopd"]["geneval_overall"]
    assert score["mean"] == pytest.approx(2 / 3)
    assert score["standard_error"] == pytest.approx(statistics.stdev(values.values()) / math.sqrt(3))
    assert rows["danceopd"]["curve"] == [[0, 1, 1], [5, 1, 2]]
    assert rows["danceopd"]["axis"] == "default"
    assert rows["k4"]["axis"] == "queries"
    assert rows["k4"]["seeds"] == [0, 1]


PROGRAM = """
import sys
from pathlib import Path
from danceopd.reproduce.matrix import Budget
from danceopd.reproduce.run import Folders
from danceopd.reproduce.run import reproduce
configs, base = map(Path, sys.argv[1:])
budget = Budget("quick", main=8000, short=8000, ablation=8000, miniature=8000, merge=8000, seeds=1)
reproduce(["C", "E"], budget, Folders(configs, base / "work", base / "results"), seeds=1, workers=1)
"""


def test_a_killed_reproduction_goes_on_without_repeating(configs, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(configs), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    first, second = (tmp_path / "work" / s / "danceopd" / "seed0" for s in "CE")
    deadline = time.monotonic() + 600
    while not (second / "log.jsonl").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = (first / "result.json").stat().st_mtime_ns
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert (first / "result.json").stat().st_mtime_ns == made
    steps = [json.loads(line)["step"] for line in (second / "log.jsonl").read_text().splitlines() if "loss" in line]
    assert steps == sorted(set(steps))
    assert json.loads((tmp_path / "results" / "E.json").read_text())["rows"][-1]["method"] == "danceopd"


def test_a_term_signal_ends_the_workers_with_a_checkpoint(configs, tmp_path):
    command = [sys.executable, "-m", "danceopd", "reproduce", "C", "--configs", configs, "--work", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    process = subprocess.Popen([*command, "--workers", "2"], env=environment, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "C" / "danceopd" / "seed0"
    deadline = time.monotonic() + 600
    while not read_log(folder / "log.jsonl").training:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "run the same command again to go on" in said
    assert list((folder / "checkpoints").iterdir())
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its worker holds it for as long as it lives


def test_a_run_of_another_budget_is_not_gone_on_with(configs, tmp_path, monkeypatch):
    folders = place_of(configs, tmp_path)
    (first,), (second,) = (runs("C", Budget("quick", n, n, n, n, n, 1), 1) for n in (1500, 3000))
    with monkeypatch.context() as patch:
        patch.setattr(driver, "measure", lambda *_: 1 / 0)  # stopped before its checkpoints were removed
        with pytest.raises(ZeroDivisionError):
            driver.make_run(first, folders)
    assert 3000 <= driver.make_run(second, folders)["network_evaluations"] < 4500


def test_a_failed_run_is_named(configs, tmp_path, monkeypatch):
    broken = tmp_path / "configs"
    broken.mkdir()
    for path in configs.glob("setting_c.yaml"):
        raw = yaml.safe_load(path.read_text())
        raw["training"]["learning_rat"] = 1
        (broken / path.name).write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(driver, "untrained_run", lambda _: [])
    folders = place_of(broken, tmp_path)
    with pytest.raises(UserError, match=r"C/danceopd/seed0 failed; its log is .*output\.txt"):
        reproduce(["C"], TINY, folders, seeds=1, workers=1)
    assert "learning_rate" in (folders.work / "C" / "danceopd" / "seed0" / "output.txt").read_text()


def test_bad_arguments(tmp_path, capsys, monkeypatch):
    assert chosen("all") == list(SETTINGS)
    assert main(["reproduce", "G"]) == 2
    assert "no setting 'G'; there are A, B" in capsys.readouterr().err
    monkeypatch.setattr(driver, "reproduce", lambda *_: pytest.fail("what is refused is not begun"))
    for wrong in (["--seeds", "-1"], ["--seeds", "0"], ["--workers", "0"]):
        with pytest.raises(SystemExit):
            main(["reproduce", "A", *wrong])
        assert f"{wrong[0]}: must be at least 1" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "A", "--configs", "nowhere"]) == 2
    assert "no configuration at nowhere/setting_a.yaml; --configs FOLDER" in capsys.readouterr().err


def test_the_settings_files_that_ship_are_found_from_any_folder(tmp_path, monkeypatch):
    here = Folders(CONFIGS, tmp_path / "work", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    shipped = Folders(Path("configs"), tmp_path / "work", tmp_path / "results")
    for setting in ("A", "miniature", "operators"):
        run = runs(setting, BUDGETS["paper"], 1)[0]
        assert config_of(run, shipped) == config_of(run, here)
        assert digest(run, shipped) == digest(run, here)
    with pytest.raises(UserError, match=r"no configuration at nowhere.setting_a\.yaml; --configs"):
        config_of(runs("A", BUDGETS["paper"], 1)[0], Folders(Path("nowhere"), tmp_path, tmp_path))
