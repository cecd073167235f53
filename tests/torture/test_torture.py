"""That `make torture` damages files, and sees what it looks for: each fault is made here once."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from danceopd.support.errors import UserError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def made():
    """The modules mutations and worker."""
    sys.path.insert(0, str(HERE))
    yield importlib.import_module("mutations"), importlib.import_module("worker")
    sys.path.remove(str(HERE))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.yaml", "a.png"])
def test_a_seed_damages_a_file_in_one_way(made, name):
    data = json.dumps({"a": [1, 2.5, "three"], "b": {"c": None}}).encode() + b"\n"
    damaged = [made[0].damaged(data, name, random.Random(seed)) for seed in range(200)]
    assert damaged == [made[0].damaged(data, name, random.Random(seed)) for seed in range(200)]
    assert len(set(damaged) - {data}) > 100


def test_values_are_changed_one_at_a_time(made):
    value = {"a": [1, 2.5, "three"], "b": {"c": None}}
    found = [made[0].changed(value, random.Random(seed)) for seed in range(300)]
    assert value == {"a": [1, 2.5, "three"], "b": {"c": None}}
    assert any("a" not in one for one in found)
    assert any("b" in one and one["b"] == {} for one in found)
    assert any(len(one.get("a") or ()) == 2 for one in found if isinstance(one.get("a"), list))


def spin(path, name):
    while True:
        pass


def fail(path, name):
    raise KeyError("x")


def refuse(path, name):
    raise UserError("no")


def print_trace(path, name):
    print("Traceback (most recent call last)")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda path, name: None, None),
        (lambda path, name: 2, None),
        (refuse, None),
        (fail, "traceback: KeyError"),
        (lambda path, name: 137, "ends with the status 137"),
        (print_trace, "prints a traceback"),
        (spin, "hangs"),
    ],
)
def test_what_becomes_of_an_input_is_seen(made, tmp_path, run, said):
    def hang(*_):
        raise made[1].Hang

    before = signal.signal(signal.SIGPROF, hang)
    try:
        found = made[1].attempt(run, tmp_path, "a", (OSError,), 0.2)
    finally:
        signal.signal(signal.SIGPROF, before)
    assert found is None if said is None else said in found


def test_what_leaves_the_folder_is_seen(made, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"x")
    guard = made[1].Guard(tmp_path / "case", secret)
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "link").symlink_to(tmp_path / "elsewhere")
    harmless = [lambda: (tmp_path / "case" / "a").write_text("x"), lambda: Path(__file__).read_bytes()]
    faults = [
        lambda: (tmp_path / "b").write_text("x"),
        lambda: (tmp_path / "case" / "link").write_text("x"),
        lambda: secret.read_bytes(),
        lambda: os.rename(tmp_path / "case" / "a", tmp_path / "c"),
        lambda: (tmp_path / "d").mkdir(),
        lambda: subprocess.run([sys.executable, "-c", ""], check=True),
    ]
    seen = []
    for act in (*harmless, *faults):
        guard.seen, guard.on = [], True
        act()
        guard.on = False
        seen.append(bool(guard.seen))
    assert seen == [False] * len(harmless) + [True] * len(faults)
