"""Two threads, one where tests run side by side or OMP_NUM_THREADS says so: more gain nothing at this size.

Without a GPU Triton interprets its kernels.
"""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
alone = os.environ.get("OMP_NUM_THREADS") != "1" and "PYTEST_XDIST_WORKER" not in os.environ
torch.set_num_threads(2 if alone else 1)
settings.register_profile("danceopd", deadline=None, max_examples=20, database=None)
settings.load_profile("danceopd")


def pytest_collection_modifyitems(items):
    """The longest modules first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: "zero" not in item.path.parts)
