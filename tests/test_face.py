"""The public face: the stable names, what docs/api.md says of them, and a run from Python."""

import ast
import doctest
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import make_api
import pytest
import torch
import yaml
from world_runs import raw_run, write_networks

import danceopd
from danceopd import UserError, distill

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in danceopd.__all__ if inspect.isfunction(getattr(danceopd, name))]


def test_the_names_come_when_they_are_asked_for():
    program = "import sys, danceopd; assert 'torch' not in sys.modules; from danceopd import *; print(*dir())"
    given = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(danceopd.__all__) <= set(given.split())
    assert dir(danceopd) == sorted(danceopd.__all__, key=lambda name: (name[0].islower(), name))
    with pytest.raises(AttributeError, match="no attribute 'dance_loss'"):
        _ = danceopd.dance_loss


def test_the_list_of_names_is_what_the_docstrings_say():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == make_api.api(), "make docs writes docs/api.md again"


@pytest.mark.parametrize(
    "program",
    ["import danceopd", "import runpy, sys; sys.argv[:] = ['setup.py', '--version']; runpy.run_path('setup.py')"],
)
def test_an_older_python_is_told_which_it_needs(program):
    older = f"import sys; sys.version_info = (3, 10, 12, 'final', 0); {program}"
    run = subprocess.run([sys.executable, "-c", older], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "danceopd needs Python 3.11 or newer, this is " in run.stderr.splitlines()[-1]
    for file in (ROOT / "setup.py", ROOT / "danceopd" / "__init__.py"):
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 7))


def test_the_metadata_names_the_python_it_needs_and_the_types_are_installed(tmp_path):
    for part in ("setup.py", "README.md", "LICENSE", "THIRD_PARTY.md", "configs", "danceopd", "kernels", "csrc"):
        (tmp_path / part).symlink_to(ROOT / part)
    build = [sys.executable, "setup.py", "-q", "egg_info", "-e", ".", "build_py", "-d", "built"]
    subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "\nRequires-Python: >=3.11\n" in (tmp_path / "danceopd.egg-info" / "PKG-INFO").read_text(encoding="utf-8")
    assert (tmp_path / "built" / "danceopd" / "py.typed").exists()


@pytest.mark.parametrize("name", danceopd.__all__)
def test_a_docstring_is_whole_and_its_examples_run(name):
    stable = getattr(danceopd, name)
    sections = ("Args", "Returns", "Example") if name in FUNCTIONS else ()
    assert stable.__doc__
    assert all(f"\n    {section}:\n" in stable.__doc__ for section in sections)
    if name == "distill":  # a whole run, which has tests of its own
        return
    names = {"torch": torch, **{other: getattr(danceopd, other) for other in danceopd.__all__}}
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(stable, name, globs=names):
        assert test.examples or name not in FUNCTIONS
        assert not runner.run(test).failed


def test_the_loop_of_the_readme_trains():
    (block,) = re.findall(r"```python\nimport danceopd\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    scale, generator = torch.tensor(3.0, requires_grad=True), torch.Generator().manual_seed(0)
    names = {
        "danceopd": danceopd,
        "student": lambda latents, sigma, conditioning: scale * latents,
        "sources": [lambda latents, sigma, conditioning: 2 * latents] * 2,
        "batches": [(torch.randn(8, 4, generator=generator), torch.zeros(8)) for _ in range(60)],
        "optimizer": torch.optim.SGD([scale], lr=1.0),
        "generator": generator,
    }
    exec(block, names)
    torch.testing.assert_close(scale.detach(), torch.tensor(2.0), rtol=0.01, atol=0)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    write_networks(folder)
    return raw_run(folder)


@pytest.mark.parametrize("given", ["values", "file"])
def test_a_run_from_python(raw, tmp_path, given):
    run = tmp_path / "run"
    overrides = ["training.max_steps=5", f"training.output_dir={run}", "training.sample_every=5"]
    config = raw
    if given == "file":
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(raw))
    records = []
    assert distill(config, overrides, callbacks=[records.append]) == run
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(record["loss"]) and record["loss"] > 0 for record in records)
    assert all(record["loss_by_capability"].keys() == {"t2i", "edit"} for record in records)
    assert (run / "student.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "key"),
    [("training.max_stepz=5", "training.max_stepz"), ("rollout.num_inference_steps=0", "rollout.num_inference_steps")],
)
def test_a_mistake_is_named_by_its_key_before_anything_runs(raw, tmp_path, change, key):
    records, run = [], tmp_path / "run"
    with pytest.raises(UserError, match=key):
        distill(raw, [change, f"training.output_dir={run}"], callbacks=[records.append])
    assert not records
    assert not run.exists()
