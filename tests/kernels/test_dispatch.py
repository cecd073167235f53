"""Which backend runs, and what the user is told about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from danceopd_kernels import compiled, dispatch, info

ROOT = Path(__file__).parents[2]
FLOATS = (torch.float32,)


def test_the_fastest_that_can(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    x = torch.zeros(1)
    built = compiled.module("cpu") is not None
    assert dispatch.choose(x, None, FLOATS, ("cpu", "triton")) == ("cpu" if built else "torch")
    assert dispatch.choose(x, None, FLOATS) == "torch"
    assert dispatch.choose(x.double(), None, FLOATS, ("cpu",)) == "torch"
    monkeypatch.setattr(compiled, "module", lambda _: None)
    assert dispatch.choose(x, None, FLOATS, ("cpu",)) == "torch"


def test_argument_before_environment(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.choose(x, None, FLOATS, ("cpu",)) == "torch"
    if compiled.module("cpu"):
        assert dispatch.choose(x, "cpu", FLOATS, ("cpu",)) == "cpu"
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")  # cannot run here, or offers nothing: passed over
    assert dispatch.choose(x, None, FLOATS, ()) == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(ValueError, match="unknown backend 'fast'; use one of torch, cpu, cuda, triton"):
        dispatch.choose(x, None, FLOATS)


@pytest.mark.parametrize(
    ("backend", "offered", "dtype", "reason"),
    [
        ("cpu", ("triton",), torch.float32, "no such kernel"),
        ("cpu", ("cpu",), torch.float64, "no kernel for torch.float64"),
        ("cuda", ("cuda",), torch.float32, "the tensors are on cpu"),
    ],
)
def test_what_cannot_run_says_why(backend, offered, dtype, reason):
    with pytest.raises(ValueError, match=reason):
        dispatch.choose(torch.zeros(1, dtype=dtype), backend, FLOATS, offered)


def test_info_tells_what_is_there_and_why(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    text = info()
    assert f"{dispatch.VARIABLE}=torch" in text
    for backend in ("cpu", "cuda", "triton"):
        assert f"\n{backend}: " in text
    if not torch.cuda.is_available():
        assert "triton: not used: " in text


def test_without_triton_and_without_the_compiled_module(tmp_path):
    """PyTorch alone must do, and say so."""
    program = """
import sys
sys.modules["triton"] = None
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import danceopd_kernels as k
from danceopd_kernels import compiled
compiled.module = lambda backend: None
x, t = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)
loss = k.routed_velocity_mse(x, t)
loss.backward()
assert loss == 1 and x.grad.eq(1 / 3).all()
assert k.euler_step_(torch.ones(2, 3), t + 1, torch.ones(2), torch.zeros(2)).eq(0).all()
print(k.info())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "triton: not used: triton is not installed" in result.stdout
    assert "cpu: not used: danceopd_kernels._C was not built" in result.stdout


def test_the_kernels_never_import_the_trainer():
    program = "import danceopd_kernels, sys; assert not any(m.split('.')[0] == 'danceopd' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "kernels")})
    for path in (ROOT / "kernels" / "danceopd_kernels").glob("*.py"):
        text = path.read_text()
        assert "import danceopd\n" not in text
        assert "from danceopd." not in text
