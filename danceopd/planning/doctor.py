"""Looks at the machine and at what is installed: `danceopd doctor`."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from danceopd.support.memory import GIB, format_bytes
from danceopd.support.texts import many
from danceopd.support.versions import version as own_version

OK, MISSING, BROKEN = "ok", "missing", "broken"

LEAST_SHARED = GIB // 4  # of shared memory, for several processes on a machine

LEAST_DISK = GIB  # of the current folder: a run of the embedded network and its checkpoints

# Packages beside torch that everything needs, by the module that is imported.
NEEDED = {
    "numpy": "numpy",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "peft": "peft",
    "tokenizers": "tokenizers",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "psutil": "psutil",
}

# What an optional package is for, and what installs it.
OPTIONAL = {
    "diffusers": ("published models: training, export, merge-loras", "danceopd[models]"),
    "transformers": ("published models: their text encoders", "danceopd[models]"),
    "accelerate": ("published models: loading without twice their memory", "danceopd[models]"),
    "torchvision": ("Qwen-Image-Edit-Plus: its encoder's pictures", "danceopd[models]"),
    "datasets": ("danceopd data import, GEdit-Bench's data", "danceopd[datasets]"),
    "deepspeed": ("training on several cards or machines (ZeRO)", "danceopd[deepspeed]"),
    "torchao": ("training.base_precision: int8", "danceopd[8bit]"),
    "bitsandbytes": ("training.optimizer: adamw_8bit; torchao's is used without", "danceopd[8bit]"),
    "flash_attn": ("faster attention on a card; torch's own is used without", "danceopd[flash-attn]"),
    "starlette": ("danceopd watch", "danceopd[watch]"),
    "wandb": ("training.trackers: [wandb]", "danceopd[trackers]"),
    "trackio": ("training.trackers: [trackio]", "danceopd[trackers]"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        group: What it belongs to.
        name: What it is.
        state: OK; MISSING, where something works less or not as fast; BROKEN, where nothing runs.
        text: What is there, or what is lost without it.
        mend: The one command, or step, that mends it; "" where nothing is to be done.
    """

    group: str
    name: str
    state: str
    text: str
    mend: str = ""


def examine_machine(try_embedded: Callable[[], str]) -> list[Finding]:
    """Looks at everything; nothing is written.

    Args:
        try_embedded: Asks the embedded network once and says what it found; what it raises is a finding.

    Returns:
        The findings, by group.
    """
    found = [*_python(), *_torch()]
    if not any(one.state == BROKEN for one in found):
        found += [*_kernels(), _embedded(try_embedded)]
    return [*found, *_packages(), *_room(), *_hub()]


def text_of(found: list[Finding]) -> str:
    """Writes the findings for a terminal, and what to do about them."""
    marks = {OK: "ok", MISSING: "--", BROKEN: "XX"}
    lines, group = [], None
    for one in found:
        if one.group != group:
            lines += ["", one.group] if lines else [one.group]
            group = one.group
        lines.append(f"  {marks[one.state]}  {one.name:18} {one.text}")
        if one.mend:
            lines.append(f"  {'':4}{'':18} -> {one.mend}")
    broken = [one.name for one in found if one.state == BROKEN]
    if broken:
        lines += ["", f"Nothing can be trained here yet: mend {', '.join(broken)}, as the lines marked XX say."]
    else:
        lines += ["", "The demo runs here: danceopd demo. What is marked -- is optional."]
    return "\n".join(lines)


def values_of(found: list[Finding]) -> dict:
    """Returns the findings as plain values, as --json prints them."""
    return {"ok": all(one.state != BROKEN for one in found), "findings": [asdict(one) for one in found]}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    group, now = "Python", platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Finding(group, "python", OK if good else BROKEN, now, "" if good else "install Python 3.11 or newer")
    yield Finding(group, "danceopd", OK, own_version())
    absent = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if absent:
        yield Finding(group, "needed packages", BROKEN, f"lacks {', '.join(absent)}", f"pip install {' '.join(absent)}")


def _torch() -> Iterator[Finding]:
    group = "Device"
    try:
        import torch
    except (ImportError, OSError) as error:
        text = f"cannot be imported: {str(error).splitlines()[0]}"
        yield Finding(group, "torch", BROKEN, text, "pip install --force-reinstall torch")
        return
    from danceopd.support.devices import LOADED, machine, no_cuda

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    if torch.version.hip:
        built = f"for ROCm {torch.version.hip}"
    yield Finding(group, "torch", OK, f"{torch.__version__}, built {built}")
    here = machine()
    yield Finding(group, "processor", OK, f"{here['cpu']}, {here['cores']} cores, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            text = f"{card.name}, {format_bytes(card.total_memory)}, capability {card.major}.{card.minor}"
            yield Finding(group, f"card {i}", OK, text)
        if torch.version.hip:
            yield Finding(group, "ROCm", MISSING, "nothing was tested on AMD's cards; kernels run as plain PyTorch")
    elif reason := no_cuda():
        yield Finding(
            group, "card", MISSING, f"there is one that torch cannot use: {reason}", reason.rpartition("; ")[2]
        )
    else:
        why = "no NVIDIA driver" if not LOADED.exists() else "no card"
        yield Finding(group, "card", MISSING, f"{why}: the demo and the miniature run; published models need a card")


def _kernels() -> Iterator[Finding]:
    from danceopd_kernels import compiled, dispatch

    group, host = "Kernels", compiled.module("cpu")
    if host is None:
        text = "the C++ kernels were not built: plain PyTorch computes instead, more slowly"
        yield Finding(
            group, "host", MISSING, text, "install a C++ compiler (g++), then pip install --force-reinstall danceopd"
        )
    else:
        yield Finding(group, "host", OK, f"C++, instruction set {host.instruction_set()}")
    import torch

    triton = dispatch.unavailable("triton")
    if not torch.cuda.is_available():
        yield Finding(
            group,
            "triton",
            OK,
            "not used without a card" if triton else f"{_installed('triton')}, not used without a card",
        )
    elif triton:
        yield Finding(
            group, "triton", MISSING, "kernels run as plain PyTorch on the card", "pip install 'danceopd[triton]'"
        )
    else:
        yield Finding(group, "triton", OK, str(_installed("triton")))


def _embedded(try_embedded: Callable[[], str]) -> Finding:
    try:
        return Finding("Kernels", "embedded network", OK, try_embedded())
    except Exception as error:  # whatever it is, it is what a run would meet
        text = f"cannot be asked: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return Finding("Kernels", "embedded network", BROKEN, text, "pip install --force-reinstall --no-deps danceopd")


def _packages() -> Iterator[Finding]:
    for package, (purpose, extra) in OPTIONAL.items():
        there = find_spec(package) is not None and (_installed(package.replace("_", "-")) or "there")
        pair = torchvision_for(_installed("torch")) if package == "torchvision" else None
        # The newest torchvision would bring another torch with it.
        mend = f"pip install torchvision=={pair}" if pair else f"pip install '{extra}'"
        if pair and there and (needs := _torch_of_torchvision()) not in (None, _release(_installed("torch"))):
            text = f"{there} belongs to torch {needs}, and {_installed('torch')} is here: importing it ends in an error"
            yield Finding("Optional packages", package, MISSING, text, mend)
        elif there:
            yield Finding("Optional packages", package, OK, there)
        else:
            yield Finding("Optional packages", package, MISSING, f"for {purpose}", mend)


def _release(torch: str | None) -> str:
    """Returns a version without what stands behind it, such as +cpu."""
    return (torch or "").partition("+")[0]


def torchvision_for(torch: str | None) -> str | None:
    """Returns the version of torchvision that belongs to a version of torch: 0.(N + 15).P to 2.N.P.

    Args:
        torch: The version, "2.13.0+cpu".

    Returns:
        "0.28.0"; None where it is no such version.
    """
    match = re.fullmatch(r"2\.(\d+)\.(\d+)", _release(torch))
    return f"0.{int(match[1]) + 15}.{match[2]}" if match else None


def _torch_of_torchvision() -> str | None:
    """Returns the version of torch that the installed torchvision asks for."""
    for line in requires("torchvision") or []:
        if match := re.match(r"torch\s*\(?==\s*([\d.]+)", line):
            return match[1]
    return None


def _room() -> Iterator[Finding]:
    import psutil

    group, memory = "Room", psutil.virtual_memory()
    yield Finding(group, "memory", OK, f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = "too little for several processes, which pass their tensors through it"
        mend = "start the container with --shm-size=8g" if size < LEAST_SHARED else ""
        state = MISSING if mend else OK
        yield Finding(group, "shared memory", state, f"{format_bytes(size)}{f': {small}' if mend else ''}", mend)
    free, here = shutil.disk_usage(Path.cwd()).free, Path.cwd()
    if not os.access(here, os.W_OK):
        yield Finding(group, "disk", BROKEN, f"{here} cannot be written to", "go to a folder of yours: cd ~")
    elif free < LEAST_DISK:
        yield Finding(
            group, "disk", BROKEN, f"{format_bytes(free)} free in {here}", "make room, or give training.output_dir"
        )
    else:
        yield Finding(group, "disk", OK, f"{format_bytes(free)} free in {here}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    yield Finding("Hugging Face hub", "cache", OK, f"{many(models, 'model')} in {cache}")
    if get_token():
        yield Finding("Hugging Face hub", "token", OK, "there is one")
    else:
        text = "none: models whose licence must be accepted (FLUX, SD3.5) cannot be downloaded"
        yield Finding("Hugging Face hub", "token", MISSING, text, "hf auth login")
