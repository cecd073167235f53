"""Where the kernels' tests run: PyTorch, the compiled kernels and Triton's interpreter; on a GPU all of them there.

A module takes the fixture `place`, (backend, device), in its tests; or the fixture `device` for all of them, and then
asks kernel_device.here() for it. What runs on a GPU is marked gpu.
"""

import kernel_device
import pytest
import torch
from danceopd_kernels import compiled

CUDA = torch.cuda.is_available()
GPU = pytest.mark.gpu
ON_HOST = ("torch", "cpu")  # the backends of a host beside a GPU, where Triton interprets nothing


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        on_host = [("torch", "cpu"), ("cpu", "cpu")] + ([] if CUDA else [("triton", "cpu")])
        on_device = [pytest.param(p, marks=GPU) for p in (("torch", "cuda"), ("cuda", "cuda"), ("triton", "cuda"))]
        metafunc.parametrize("place", [*on_host, *on_device], ids=lambda p: "-".join(p))
    if "device" in metafunc.fixturenames:
        there = [pytest.param(d, marks=GPU) if d == "cuda" else d for d in kernel_device.devices()]
        metafunc.parametrize("device", there, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Leaves out what cannot run: the host's kernels on a GPU; and beside a GPU, where Triton interprets nothing, the
    tests on the host that name no backend of its own."""
    kept, left = [], []
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        on_host = given.get("device") == "cpu" and CUDA and given.get("backend", "triton") not in ON_HOST
        on_gpu = given.get("device") == "cuda" and given.get("backend") == "cpu"
        (left if on_host or on_gpu else kept).append(item)
    items[:] = kept
    if left:
        config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="module")
def device(request):
    kernel_device.go_to(request.param)
    yield request.param
    kernel_device.go_to("cpu")


@pytest.fixture(autouse=True)
def _place_is_there(request):
    """Skips a test where its place is not: no GPU, or a compiled module that was not built."""
    if "place" not in request.fixturenames:
        return
    backend, device = request.getfixturevalue("place")
    if device == "cuda" and not CUDA:
        pytest.skip("no CUDA device")
    if backend in ("cpu", "cuda") and compiled.module(backend) is None:
        pytest.skip(f"the {backend} module was not built")
