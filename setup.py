"""Installs the packages `danceopd` and `danceopd_kernels`; see README.md."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

if sys.version_info < (3, 11):  # noqa: UP036 (an older Python runs this file all the same)
    sys.exit("danceopd needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": install it with python3.11")

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from build_csrc import BuildExtensions, extensions

setup(
    name="danceopd",
    version="0.1.0",
    description="On-policy generative field distillation: several flow-matching models become one student",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["danceopd", "danceopd.*"]), "danceopd_kernels"],
    package_dir={"danceopd_kernels": "kernels/danceopd_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
    package_data={
        "danceopd": ["py.typed"],
        "danceopd.world": ["assets/*", "assets/sources/*"],
        "danceopd.miniature": [
            "assets/*",
            "assets/logs/*",
            "assets/pipeline/*",
            "assets/pipeline/*/*",
            "assets/sources/*/*",
        ],
        "danceopd.evaluation": ["*.j2"],
        "danceopd.report": ["*.j2"],
        "danceopd.tools": ["merge_loras/*.txt", "merge_loras/*.j2"],
    },
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "peft>=0.15",
        "tokenizers>=0.20",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "pillow>=10.0",
        "tqdm>=4.66",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "psutil>=5.9",
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "basedpyright>=1.39",
            "diffusers>=0.42",
            "transformers>=5.0",
            "accelerate>=1.0",
            "datasets>=3.0",
            "ftfy>=6.1",
            "torchao>=0.18",
            "triton>=3.2; platform_system == 'Linux'",
            "pybind11>=2.12",
            "deepspeed>=0.18,<0.20",
            "flow_matching>=1.0.10",  # one of the kernels' examples; CC BY-NC 4.0, as everything else here is not
        ],
        "models": ["diffusers>=0.42", "transformers>=5.0", "accelerate>=1.0"],
        "prx": ["ftfy>=6.1"],
        "datasets": ["datasets>=3.0"],
        "8bit": ["bitsandbytes>=0.45", "torchao>=0.18"],
        "deepspeed": ["deepspeed>=0.18,<0.20"],
        "triton": ["triton>=3.2"],
        "flash-attn": ["flash-attn>=2.6.3"],
    },
    entry_points={"console_scripts": ["danceopd=danceopd.cli:main"]},
)
