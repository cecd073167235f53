"""Two threads, one where tests run side by side or OMP_NUM_THREADS says so: more gain nothing at this size.

Without a GPU Triton interprets its kernels.
"""

import os

# On some processors MKL's order of sums follows where a tensor lies: runs that are equal to the bit would not be.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")  # before its first sum

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start too: threads that wait spin
alone = os.environ.get("OMP_NUM_THREADS") != "1" and "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(2 if alone else 1)
busy = [HealthCheck.too_slow]  # a machine that does other things too is no fault
settings.register_profile("danceopd", deadline=None, max_examples=20, database=None, suppress_health_check=busy)
settings.load_profile("danceopd")


def pytest_collection_modifyitems(items):
    """The longest modules first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: "zero" not in item.path.parts)


def _kept(tmp_path_factory, write):
    """A function of a family that writes its folder when it is first asked for."""
    made = {}

    def place(family):
        if family not in made:
            made[family] = write(tmp_path_factory.mktemp(family), family)
        return made[family]

    return place


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """places(family): a folder with model, two LoRA files, weights of another transformer, rows of random encodings.

    All tests of a process share it, so none may change it; model_runs.write_place says what it holds.
    """
    from model_runs import write_place  # seconds to import, which most tests need not

    return _kept(tmp_path_factory, write_place)


@pytest.fixture(scope="session")
def prepared_places(tmp_path_factory):
    """prepared_places(family): a folder with model, two teachers written by diffusers, rows that the model encoded.

    All tests of a process share it, so none may change it; model_runs.prepare_place says what it holds.
    """
    from model_runs import prepare_place

    return _kept(tmp_path_factory, prepare_place)
