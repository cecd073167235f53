"""GPU code without a GPU: every Triton kernel compiled for sm_80 and sm_90, csrc by nvcc where there is one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "kernels")}


def test_the_committed_table_is_what_the_kernels_compile_to():
    command = [sys.executable, "-W", "ignore", "-m", "danceopd_kernels.resources", "--check"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_falls_short_is_told():
    from danceopd_kernels.resources import Configuration, Resources, problems

    wanted = Configuration("k", None, {}, {}, 4, 64, streaming=True, product=True)
    short = Resources("k", 90, 100, 65, 8, 0, wide_loads=0, loads=4, wide_stores=1, stores=1, tensor_core="mma")
    told = " / ".join(problems(wanted, short))
    for part in ("8 bytes of stack", "65 registers, 64 allowed", "no 128-bit loads", "no wgmma"):
        assert part in told
    assert not any("stack" in problem for problem in problems(wanted, short, 8))
    enough = Resources("k", 80, 100, 64, 0, 0, wide_loads=4, loads=4, wide_stores=1, stores=1, tensor_core="mma")
    assert problems(wanted, enough) == []


@pytest.mark.parametrize(("version", "most"), [("3.6.0", 16), ("3.9.0", 0), ("3.10.1+git1", 0), ("4.0", 0)])
def test_an_older_triton_may_spill_a_little(version, most):
    from danceopd_kernels.resources import allowed_stack

    assert allowed_stack(version) == most


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.timeout(300)
def test_the_cuda_module_builds_and_imports_without_a_gpu(tmp_path):
    import sysconfig

    import pybind11

    sys.path.insert(0, str(ROOT / "kernels"))
    try:
        from build_csrc import nvcc_command
    finally:
        sys.path.pop(0)
    target = tmp_path / "_CUDA.so"
    folders = [pybind11.get_include(), sysconfig.get_path("include")]
    command = nvcc_command("nvcc", str(ROOT / "csrc" / "cuda.cu"), target, folders)
    subprocess.run(command, check=True, capture_output=True)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import _CUDA; print(_CUDA.CHUNK)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "8192"

    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", target], capture_output=True, text=True, check=True).stdout
    assert {"sm_80", "sm_90"} <= set(re.findall(r"arch = (sm_\d+)", usage))
    kernels = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    assert len(kernels) >= 2 * 3 * 2 * 9  # architectures, dtypes, widths of a load, variants
    assert all(int(registers) <= 64 and stack == "0" for registers, stack in kernels)
    code = subprocess.run([tool, "-sass", target], capture_output=True, text=True, check=True).stdout
    assert "LDG.E.128" in code
    assert "STG.E.128" in code
