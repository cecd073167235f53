"""The examples and the documentation do what they say, with the kernels and without."""

import doctest
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import danceopd_kernels
import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "kernels" / "examples").glob("*.py"))
NEEDS = {"flow_matching_loop": ("flow_matching", "torchdiffeq"), "diffusers_sd3_lora": ("diffusers", "peft")}
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors are tiny here, and threads that wait for each other cost most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(path: Path):
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_the_same_losses_with_and_without_the_kernels(path, capsys, monkeypatch):
    monkeypatch.delenv("DANCEOPD_KERNELS", raising=False)
    main = load(path).main
    with_kernels = main()
    printed = capsys.readouterr().out.split()
    without = main("torch")
    assert [f"{loss:.5f}" for loss in with_kernels] == [x for x in printed if re.fullmatch(r"\d+\.\d{5}", x)]
    torch.testing.assert_close(torch.tensor(with_kernels), torch.tensor(without), rtol=1e-4, atol=0)
    quarter = len(without) // 4
    assert sum(with_kernels[-quarter:]) < 0.9 * sum(with_kernels[:quarter])


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is only used without a GPU")
def test_the_same_losses_by_tritons_kernels():
    pytest.importorskip("triton")
    main = load(ROOT / "kernels" / "examples" / "plain_loop.py").main
    torch.testing.assert_close(*(torch.tensor(main(b, updates=4)) for b in ("triton", "torch")), rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [[], ["--backend", "torch"]], ids=["kernels", "torch"])
def test_on_the_command_line(options, capsys, monkeypatch):
    path = ROOT / "kernels" / "examples" / "plain_loop.py"
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.split()) == 60


@pytest.mark.parametrize("backend", [None, "torch"])
def test_every_block_of_the_documentation_runs(backend, monkeypatch):
    monkeypatch.delenv("DANCEOPD_KERNELS", raising=False)
    if backend:
        monkeypatch.setenv("DANCEOPD_KERNELS", backend)
    torch.manual_seed(0)
    namespace = {"__name__": "docs"}
    for i, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/kernels.md, block {i}", "exec"), namespace)


@pytest.mark.parametrize("name", danceopd_kernels.__all__)
def test_every_example_of_a_docstring_runs(name):
    operation = getattr(danceopd_kernels, name)
    text = operation.__doc__
    examples = doctest.DocTestParser().get_examples(text)
    names = {"torch": torch, **vars(danceopd_kernels)}
    for example in examples:
        exec(example.source, names)
    if name[0].islower() and name != "info":
        assert examples
        assert all(f"    {part}:" in text for part in ("Args", "Returns", "Raises", "Example"))


def test_the_documentation_names_every_operation():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert not [name for name in danceopd_kernels.__all__ if name not in text]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_another_package_named_kernels_is_still_found(tmp_path):
    """A package beats a folder without __init__.py wherever each is on the path: so the folder here must have none."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("def get_kernel():\n    return 'the other package'\n")
    program = """
import sys, kernels, danceopd_kernels
assert sys.path[0] == "", sys.path  # the root of the repository, before all others
assert kernels.get_kernel() == "the other package", kernels
assert danceopd_kernels.__file__.startswith(sys.argv[1]), danceopd_kernels
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", tmp_path)))
    command = [sys.executable, "-c", program, str(ROOT / "kernels")]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_names_the_package_that_it_lacks(name, monkeypatch):
    package = NEEDS[name][0]
    for module in [package, *(module for module in sys.modules if module.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf"this example needs {package}.*: pip install"):
        runpy.run_path(str(ROOT / "kernels" / "examples" / f"{name}.py"))
