"""Where the kernels' tests run: PyTorch, the compiled kernels and Triton's interpreter; on a GPU all of them there."""

import pytest
import torch
from danceopd_kernels import compiled

CUDA = torch.cuda.is_available()
GPU = pytest.mark.gpu


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        on_host = [("torch", "cpu"), ("cpu", "cpu")] + ([] if CUDA else [("triton", "cpu")])
        on_device = [pytest.param(p, marks=GPU) for p in (("torch", "cuda"), ("cuda", "cuda"), ("triton", "cuda"))]
        metafunc.parametrize("place", [*on_host, *on_device], ids=lambda p: "-".join(p))


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
