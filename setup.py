"""Installs the packages `danceopd` and `danceopd_kernels`; see README.md."""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

if sys.version_info < (3, 11):  # noqa: UP036 (an older Python runs this file all the same)
    sys.exit("danceopd needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": install it with python3.11")

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from build_csrc import BuildExtensions, extensions

ROOT = Path(__file__).parent

MODELS = ["diffusers>=0.42", "transformers>=5.0", "accelerate>=1.0"]
WATCH = ["starlette>=0.40", "uvicorn>=0.30"]
TRITON = "triton>=3.2; platform_system == 'Linux'"

EXTRAS = {
    "models": [*MODELS, "ftfy>=6.1", "torchvision>=0.20"],  # PRX cleans its prompts; Qwen's processor needs torchvision
    "prx": ["ftfy>=6.1"],
    "datasets": ["datasets>=3.0"],
    "8bit": ["bitsandbytes>=0.45", "torchao>=0.18"],
    "deepspeed": ["deepspeed>=0.18,<0.20"],
    "triton": [TRITON],
    "watch": WATCH,
    "trackers": ["wandb>=0.17", "trackio>=0.5"],
}
EXTRAS["all"] = sorted({package for extra in EXTRAS.values() for package in extra})
EXTRAS["flash-attn"] = ["flash-attn>=2.6.3"]  # not in all: it compiles for a card, for an hour
EXTRAS["docs"] = ["mkdocs-material>=9.5"]
EXTRAS["test"] = [
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "basedpyright>=1.39",
    *MODELS,
    *WATCH,
    "wandb>=0.17",
    "datasets>=3.0",
    "ftfy>=6.1",
    "torchao>=0.18",
    TRITON,
    "pybind11>=2.12",
    "deepspeed>=0.18,<0.20",
    "flow_matching>=1.0.10",  # one of the kernels' examples; CC BY-NC 4.0, as everything else here is not
]
EXTRAS["dev"] = [*EXTRAS["test"], "build>=1.2", "pre-commit>=3.7", "playwright>=1.45"]  # the last drives Chromium


def write_commit(package: Path) -> None:
    """Writes the commit beside the package's files, where `danceopd --version` finds it without a repository."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "danceopd" / "support" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    if versions.commit() != "unknown":
        (package / "COMMIT").write_text(versions.commit() + "\n")


class BuildPackage(build_py):
    """Lays the configurations into the wheel, where `--config configs/demo.yaml` finds them without a checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "configs", Path(self.build_lib) / "danceopd" / "configs", dirs_exist_ok=True)
            write_commit(Path(self.build_lib) / "danceopd")


class Sources(sdist):
    """Writes the commit into the archive of sources."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / "danceopd")


setup(
    name="danceopd",
    version="0.1.0",
    description="On-policy generative field distillation: several flow-matching models become one student",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "THIRD_PARTY.md"],
    project_urls={"Paper": "https://arxiv.org/abs/2606.27377"},
    keywords="diffusion flow-matching distillation LoRA text-to-image image-editing",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["danceopd", "danceopd.*"]), "danceopd_kernels"],
    package_dir={"danceopd_kernels": "kernels/danceopd_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPackage, "sdist": Sources},
    package_data={
        "danceopd": ["py.typed", "COMMIT"],
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
        "danceopd.watch": ["assets/*"],
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
        "shtab>=1.7",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["danceopd=danceopd.cli:main"]},
)
