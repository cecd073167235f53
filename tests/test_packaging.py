"""What the package says of itself: its metadata, its extras, what others made of it, and the files for joining in."""

import re
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest
import yaml

from danceopd.support.exits import EXTRAS
from danceopd.support.versions import commit

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The metadata as a wheel has it, and the list of files of the source."""
    folder = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (egg,) = folder.glob("*.egg-info")
    return message_from_string((egg / "PKG-INFO").read_text(encoding="utf-8")), (egg / "SOURCES.txt").read_text()


def test_the_wheel_says_what_it_is(metadata):
    said, _ = metadata
    assert said["Requires-Python"] == ">=3.11"
    assert said.get_payload().startswith("# DanceOPD")
    assert "Paper, https://arxiv.org/abs/2606.27377" in said.get_all("Project-URL")
    assert said["Version"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert f"## {said['Version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_archive_of_sources_knows_its_commit_without_a_repository(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (sources,) = (path for path in tmp_path.iterdir() if path.is_dir())
    code = "from runpy import run_path; print(run_path('danceopd/support/versions.py')['commit']())"
    said = subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == commit()


def test_every_extra_that_a_message_names_is_one(metadata):
    said, _ = metadata
    extras = set(said.get_all("Provides-Extra"))
    named = {name for text in EXTRAS.values() for name in re.findall(r"\[(.+)\]", text)}
    for place in ("danceopd", "docs", "README.md", "kernels"):
        files = (
            [ROOT / place]
            if (ROOT / place).is_file()
            else [*(ROOT / place).rglob("*.py"), *(ROOT / place).rglob("*.md")]
        )
        for file in files:
            named |= set(re.findall(r"danceopd\[([\w-]+)\]", file.read_text(encoding="utf-8")))
    assert named <= extras
    needs = {
        name: {one.split(";")[0] for one in said.get_all("Requires-Dist") if f'"{name}"' in one} for name in extras
    }
    for name in extras - {"test", "dev", "docs", "flash-attn"}:
        assert needs[name] <= needs["all"], name
    for package, extra in EXTRAS.items():
        own = needs[re.search(r"\[(.+)\]", extra)[1]]
        assert any(one.replace("-", "_").startswith(package) for one in own), package


def test_the_page_of_runs_and_what_compiles_are_in_the_source(metadata):
    _, files = metadata
    assets = {f"danceopd/watch/assets/{path.name}" for path in (ROOT / "danceopd/watch/assets").iterdir()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()}
    assert assets | sources | {"THIRD_PARTY.md", "configs/demo.yaml"} <= set(files.splitlines())


def test_every_file_of_others_is_named_with_its_licence():
    said = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([^)]+)\)", said):
        assert (ROOT / path).is_file(), path
    for name in ("uPlot.iife.min.js", "uPlot.min.css", "sprites.png", "things.png"):
        assert name in said
    version = re.search(r"uPlot (\d+\.\d+\.\d+)", said)[1]
    assert f"(v{version})" in (ROOT / "danceopd/watch/assets/uPlot.iife.min.js").read_text(encoding="utf-8")[:200]


@pytest.mark.parametrize(
    "path",
    [
        ".github/workflows/ci.yml",
        ".pre-commit-config.yaml",
        "CITATION.cff",
        *(".github/ISSUE_TEMPLATE/" + n for n in ("fault.yml", "wish.yml")),
    ],
)
def test_the_files_for_joining_in_are_read(path):
    values = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    for job in values.get("jobs", {}).values():
        for step in job["steps"]:
            for target in re.findall(r"\bmake (\w+)", step.get("run", "")):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
