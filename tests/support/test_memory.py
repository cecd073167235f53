"""The allocator keeps what is freed, or gives it back where nobody asked; memory that runs out is said."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from danceopd.support.exits import guarded
from danceopd.support.memory import keep_freed_memory

# How many MiB of a freed array of 256 MiB are still the process's own.
PROGRAM = """
import re, sys
from pathlib import Path
import numpy as np
from danceopd.support.memory import keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
array = np.ones(2**25)
assert resident() - before > 240
del array
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists() or not keep_freed_memory(), reason="needs Linux and glibc")
def test_freed_memory_stays_with_the_process_that_keeps_it():
    kept, given = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=True).stdout)
        for way in ("keep", "give")
    )
    assert kept > 240
    assert given < 16


def test_a_command_that_memory_does_not_suffice_for_says_so_without_a_trace(capsys):
    assert guarded(lambda _: torch.empty(2**50), None) == 2
    assert "danceopd: memory ran out: " in (said := capsys.readouterr().err)
    assert "Traceback" not in said
    with pytest.raises(RuntimeError, match="something else"):
        guarded(lambda _: (_ for _ in ()).throw(RuntimeError("something else")), None)
