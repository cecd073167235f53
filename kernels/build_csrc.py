"""The compiled modules of csrc/, for both setup.py files; without them PyTorch and Triton do the work.

DANCEOPD_BUILD_CUDA=1 builds the CUDA module too, by nvcc, for DANCEOPD_CUDA_ARCHS (default "80;90").
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def extensions() -> list[Extension]:
    """_C always, _CUDA where it is asked for; sources relative to the folder of the setup.py that runs."""
    import pybind11

    here = os.path.relpath(CSRC)
    headers = [os.path.join(here, p.name) for p in sorted(CSRC.iterdir()) if p.suffix in (".h", ".inc")]
    sources = [os.path.join(here, p.name) for p in sorted(CSRC.glob("*.cpp"))]
    common = {"include_dirs": [pybind11.get_include()], "depends": headers, "optional": True}
    made = [Extension("danceopd_kernels._C", sources, **common)]
    if os.environ.get("DANCEOPD_BUILD_CUDA") == "1":
        made.append(Extension("danceopd_kernels._CUDA", [os.path.join(here, "cuda.cu")], **common))
    return made


class BuildExtensions(build_ext):
    """Flags by compiler; .cu files by nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_CUDA"):
            return self._build_cuda(ext)
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/O2", "/std:c++17", "/openmp:experimental"]
        else:
            openmp = ["-fopenmp"] if self._compiles("-fopenmp") else []
            flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-g0"]
            ext.extra_compile_args, ext.extra_link_args = [*flags, *openmp], openmp
        super().build_extension(ext)

    def _compiles(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "t.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n")
            command = [*self.compiler.compiler_cxx[:1], flag, str(source), "-o", str(Path(folder, "t"))]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False

    def _build_cuda(self, ext: Extension) -> None:
        nvcc = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn(nvcc_command(nvcc, ext.sources[0], target, [*ext.include_dirs, *self.include_dirs]))


def nvcc_command(nvcc: str, source: str, target: Path, include_dirs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for those to come."""
    archs = os.environ.get("DANCEOPD_CUDA_ARCHS", "80;90").split(";")
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = ["-O3", "-std=c++17", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return [nvcc, *flags, *code, *(f"-I{folder}" for folder in include_dirs), source, "-o", str(target)]
