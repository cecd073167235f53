"""The compiled modules: _C of host kernels, _CUDA of device kernels. Tensors go in as addresses."""

from functools import cache
from importlib import import_module

import torch


@cache
def module(backend: str):
    """The compiled module of a backend, "cpu" or "cuda"; None where it was not built."""
    try:
        return import_module("danceopd_kernels._C" if backend == "cpu" else "danceopd_kernels._CUDA")
    except ImportError:
        return None


def chunks(backend: str, elements: int) -> int:
    """How many partial sums a sample of so many elements gets."""
    return -(-elements // module(backend).CHUNK)


def call(backend: str, kernel: str, dtype: torch.dtype, device: torch.device, **values) -> None:
    """Run a compiled kernel. values: its problem's fields (csrc/problems.h): contiguous tensors, numbers, or None."""
    fields = {name: _plain(value) for name, value in values.items()}
    where = torch.get_num_threads() if backend == "cpu" else torch.cuda.current_stream(device).cuda_stream
    name = str(dtype).removeprefix("torch.")
    if backend == "cpu":
        module(backend).__dict__[kernel](name, fields, where)
    else:
        with torch.cuda.device(device):
            module(backend).__dict__[kernel](name, fields, where)


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, list):
        return [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in value]
    return 0 if value is None else value
