"""Two threads (one if OMP_NUM_THREADS says so): more gain nothing at this size. Without a GPU Triton interprets."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
torch.set_num_threads(1 if os.environ.get("OMP_NUM_THREADS") == "1" else 2)
settings.register_profile("danceopd", deadline=None, max_examples=20, database=None)
settings.load_profile("danceopd")
