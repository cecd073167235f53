"""Devices by name, and why a machine's card cannot be used, in words."""

import pytest
import torch

from danceopd.support import devices
from danceopd.support.errors import UserError

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\nGCC version: 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (root@x)\nGCC version: 14\n"
NEW = CLOSED.replace("535.54.03", "580.65.06")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(driver, cuda): without a usable card, with this driver's file, and a torch built for this CUDA."""

    def place(driver, cuda):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(devices, "LOADED", tmp_path / "version")
        if driver:
            (tmp_path / "version").write_text(driver)

    return place


@pytest.mark.parametrize(
    ("driver", "cuda", "said"),
    [
        (CLOSED, "13.0", "CUDA 13.0, which needs NVIDIA's driver 580 or later, and this machine has 535.54.03"),
        (OPEN, "13.2", "needs NVIDIA's driver 580 or later, and this machine has 570.124.06"),
        (NEW, None, "is built without CUDA; install a torch with it (this machine has NVIDIA's driver 580.65.06)"),
    ],
)
def test_why_there_is_no_cuda_is_said(machine, capsys, driver, cuda, said):
    machine(driver, cuda)
    assert devices.find_device("auto") == torch.device("cpu")
    assert said in capsys.readouterr().err
    with pytest.raises(UserError) as raised:
        devices.find_device("cuda")
    assert said in str(raised.value)
    assert devices.find_device("cpu") == torch.device("cpu")
    assert not capsys.readouterr().err  # who asks for the CPU is told nothing


@pytest.mark.parametrize(("driver", "cuda"), [("", "13.0"), (NEW, "13.0"), (OPEN, "12.8"), ("nonsense", "13.0")])
def test_what_is_not_known_is_not_said(machine, capsys, driver, cuda):
    machine(driver, cuda)
    assert devices.find_device("auto") == torch.device("cpu")
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="no CUDA device is available; use cpu or auto"):
        devices.find_device("cuda")
