"""Installs the package `danceopd_kernels` alone; see docs/kernels.md."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
from build_csrc import BuildExtensions, extensions

setup(
    name="danceopd_kernels",
    version="0.1.0",
    description="Fused kernels for flow-matching trainers",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["danceopd_kernels"],
    install_requires=["torch>=2.6"],
    extras_require={"triton": ["triton>=3.2"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
