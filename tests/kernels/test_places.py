"""On a machine with a card, each operation's comparison with its definition runs on each backend, there and here."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent

# The comparisons, and the backends that a machine with a card runs each on: those of the host, those of the card.
WANTED = {
    "test_operations.py::test_numbers_of_any_size": ({"torch", "cpu"}, {"torch", "cuda", "triton"}),
    "test_routed_velocity_mse.py::test_agrees_with_float64": ({"torch", "cpu"}, {"torch", "cuda", "triton"}),
    "test_steps.py::test_euler_and_heun": ({"torch", "cpu"}, {"torch", "cuda", "triton"}),
    "test_steps.py::test_sde_step": ({"torch", "cpu"}, {"torch", "cuda", "triton"}),
    "test_lora.py::test_against_float64": ({"torch"}, {"torch", "triton"}),
    "test_output_head.py::test_losses_and_gradients": ({"torch"}, {"torch", "triton"}),
    "test_adaln.py::test_outputs_and_gradients": ({"torch"}, {"torch", "triton"}),
    "test_fp8.py::test_definition": ({"torch", "cpu"}, {"torch", "triton"}),
    "test_fp8.py::test_norm_and_modulation_against_float64": ({"torch", "cpu"}, {"torch", "triton"}),
    "test_fp8.py::test_weight_only_takes_x_as_it_is": ({"torch"}, {"torch", "triton"}),
}
# For the collection, which asks nothing else of a card; it says which of the tests `-m gpu` would choose, and which
# the default.
CARD = """import torch
torch.cuda.is_available = lambda: True
def pytest_collection_finish(session):
    for item in session.items:
        gpu, slow = (item.get_closest_marker(name) is not None for name in ("gpu", "slow"))
        print(f"{'gpu' * gpu},{'default' * (not slow)} {item.nodeid}")
"""


def collected(folder: Path) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """{test: its parameters} as pytest would run them on a machine with a card: by default, and those marked gpu."""
    (folder / "with_a_card.py").write_text(CARD)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", ""), str(ROOT / "kernels")])
    files = sorted({str(FOLDER / test.partition("::")[0]) for test in WANTED})
    options = ["-p", "with_a_card", "-n0", "--collect-only", "-m", "gpu or not slow"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    everything, marked = defaultdict(set), defaultdict(set)
    said = re.findall(r"^(gpu)?,(default)? \S*?(test_\w+\.py)::(\w+)(?:\[(.*)\])?$", ran.stdout, re.MULTILINE)
    for gpu, default, file, test, parameters in said:
        for found in [everything] * bool(default) + [marked] * bool(gpu):
            found[f"{file}::{test}"].add(parameters)
    assert everything, ran.stdout + ran.stderr
    assert marked, ran.stdout + ran.stderr
    return everything, marked


def backends(parameters: set[str], device: str) -> set[str]:
    """The backends of a test's parameters on a device; a fixture's name has both, such as torch-cuda."""
    words = [p.split("-") for p in parameters]
    return {b for w in words for b in ("torch", "cpu", "cuda", "triton") if _on(w, b, device)}


def _on(words: list[str], backend: str, device: str) -> bool:
    left = list(words)
    for word in (device, backend):
        if word not in left:
            return False
        left.remove(word)
    return True


def test_every_backend_of_a_machine_with_a_card(tmp_path):
    everything, marked = collected(tmp_path)
    for test, (on_host, on_card) in WANTED.items():
        assert backends(everything[test], "cpu") >= on_host, test
        assert backends(marked[test], "cuda") >= on_card, test
        assert not backends(marked[test], "cpu") & {"torch", "triton"}, test
        assert "triton" not in backends(everything[test], "cpu"), test  # nothing is interpreted there
