"""training.trackers: W&B and trackio, without a network, get the numbers that the log gets."""

import json
import sqlite3
from collections import Counter

import pytest
from world_runs import config_of, raw_run, write_networks

from danceopd.config.reading import parse_config
from danceopd.planning.dry_run import dry_run
from danceopd.support import trackers
from danceopd.support.errors import UserError
from danceopd.support.run_log import read_log
from danceopd.training.loop import train
from danceopd.world import dry_run as world
from danceopd.world.build import build


@pytest.fixture
def raw(tmp_path):
    write_networks(tmp_path)
    made = raw_run(tmp_path)
    made["training"] |= {"max_steps": 2, "sample_every": 0}
    made["evaluation"]["times"] = 0
    return made


def test_wandb_keeps_a_run_goes_on_with_it_and_begins_another(raw, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps, overwrite in ((2, False), (3, False), (2, True)):
        train(config_of(raw, trackers=["wandb"], max_steps=steps), build, overwrite=overwrite)
    wandb.teardown()  # its process writes its files after a run's finish() has returned
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    newest = f"run-run-{(tmp_path / 'run' / 'tracker_id').read_text()}"
    assert sorted(Counter(file.stem for file in files).values()) == [1, 2]  # the second process goes on
    assert [file.stem for file in files].count(newest) == 1
    assert all(b"network_evaluations" in file.read_bytes() for file in files)


def test_trackio_has_what_the_log_has(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads as it is imported
    pytest.importorskip("trackio")
    train(config_of(raw, trackers=["trackio"]), build)
    rows: dict[int, dict] = {}
    with sqlite3.connect(tmp_path / "trackio" / "danceopd.db") as data:
        for step, text in data.execute("select step, metrics from metrics"):
            rows.setdefault(step, {}).update(json.loads(text))
    log = {record["step"]: record["loss"] for record in read_log(tmp_path / "run" / "log.jsonl").training}
    assert {step: rows[step]["loss"] for step in log} == log


def test_one_that_is_not_installed_is_named_before_anything_else(raw, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = config_of(raw, trackers=["wandb"])
    assert any("danceopd[trackers]" in line for line in dry_run(config, world.examine).problems)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'danceopd\[trackers\]'"):
        train(config, build)
    with pytest.raises(UserError, match=r"training.trackers.0: 'wandp' is not valid; did you mean 'wandb'"):
        parse_config({**raw, "training": {**raw["training"], "trackers": ["wandp"]}})


def test_one_that_does_not_start_says_what_to_do(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"training.trackers: wandb does not start: No API key .*WANDB_MODE=offline"):
        trackers.Tracker("wandb", tmp_path, {})
