"""danceopd doctor: what it finds on this machine, and on machines where something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from danceopd.cli.parser import main
from danceopd.planning import doctor
from danceopd.support.memory import GIB

TOKEN = "hf_" + "x" * 34


def works():
    return "draws"


def by_name(found):
    return {one.name: one for one in found}


def test_it_runs_here(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["doctor", "--json"]) == 0
    said = capsys.readouterr().out
    values = json.loads(said)
    found = {one["name"]: one for one in values["findings"]}
    assert values["ok"] is True
    assert torch.__version__ in found["torch"]["text"]
    assert found["embedded network"]["text"] == "draws a picture of 32 x 32 pixels"
    assert found["token"]["state"] == "ok"
    assert TOKEN not in said
    assert all(
        one["mend"] for one in values["findings"] if one["group"] == "Optional packages" and one["state"] != "ok"
    )


def test_what_is_missing_is_said_with_what_mends_it(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    there = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in ("deepspeed", "diffusers") else there(name))
    found = by_name(doctor.examine_machine(works))
    assert (found["deepspeed"].state, found["deepspeed"].mend) == ("missing", "pip install 'danceopd[deepspeed]'")
    assert found["diffusers"].mend == "pip install 'danceopd[models]'"
    said = doctor.text_of(list(found.values()))
    assert "  --  deepspeed" in said
    assert "-> pip install 'danceopd[deepspeed]'" in said
    assert "The demo runs here" in said


@pytest.mark.parametrize(
    ("here", "asks", "text", "mend"),
    [
        (None, None, "for Qwen-Image-Edit-Plus", "pip install torchvision==0.28.0"),
        (
            "0.29.2",
            "torch==2.14.0",
            "belongs to torch 2.14.0, and 2.13.0+cpu is here",
            "pip install torchvision==0.28.0",
        ),
        ("0.28.0", "torch==2.13.0", "0.28.0", ""),
    ],
)
def test_a_torchvision_of_another_torch_is_found(monkeypatch, here, asks, text, mend):
    there = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: here if name == "torchvision" else there(name))
    versions = {"torch": "2.13.0+cpu", "torchvision": here}
    monkeypatch.setattr(doctor, "_installed", lambda package: versions.get(package, "1.0"))
    monkeypatch.setattr(doctor, "requires", lambda package: ["numpy", asks, "pillow>=5"])
    found = by_name(doctor.examine_machine(works))["torchvision"]
    assert text in found.text
    assert found.mend == mend
    assert doctor.torchvision_for("3.0.0") is None


def test_what_is_broken_ends_with_1_and_says_so(monkeypatch, capsys):
    def fails():
        raise RuntimeError("no such kernel\nmore")

    found = doctor.examine_machine(fails)
    assert by_name(found)["embedded network"].text == "cannot be asked: RuntimeError: no such kernel"
    assert not doctor.values_of(found)["ok"]
    assert "mend embedded network" in doctor.text_of(found)
    monkeypatch.setattr("danceopd.cli.doctor._try_embedded", fails)
    assert main(["doctor"]) == 1
    assert "XX  embedded network" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "size", "name", "state"),
    [("/dev/shm", GIB // 16, "shared memory", "missing"), (None, GIB // 2, "disk", "broken")],
)
def test_too_little_room_is_found(monkeypatch, path, size, name, state):
    usage, real = namedtuple("usage", "total used free"), shutil.disk_usage
    small = lambda place: usage(size, 0, size) if path is None or str(place) == path else real(place)  # noqa: E731
    monkeypatch.setattr(doctor.shutil, "disk_usage", small)
    found = by_name(doctor.examine_machine(works))[name]
    assert found.state == state
    assert found.mend


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    code = "from danceopd.planning.doctor import examine_machine, text_of; print(text_of(examine_machine(None)))"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert "XX  torch" in ran.stdout, ran.stderr
    assert "libcudart.so.13" in ran.stdout
    assert "-> pip install --force-reinstall torch" in ran.stdout
