"""What examples/cluster hands to Docker, Apptainer, SLURM and SkyPilot is as their syntax and this project want it."""

import importlib.metadata
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from danceopd.cli.parser import build_parser

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples" / "cluster"


def sections():
    """The parts of the Apptainer recipe: {"": head, "files": ..., "post": ...}."""
    parts = re.split(r"^%(\w+)\n", (CLUSTER / "danceopd.def").read_text(), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def layers():
    """The Dockerfile's instructions: [(name, arguments)]."""
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(" ", 1) for line in text.splitlines() if line]


def scripts():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    recipe = sections()
    return {
        "train.sbatch": (CLUSTER / "train.sbatch").read_text(),
        "skypilot setup": task["setup"],
        "skypilot run": task["run"],
        **{f"apptainer {name}": recipe[name] for name in ("post", "runscript", "test")},
        **{f"docker {i}": words for i, (name, words) in enumerate(layers()) if name == "RUN"},
    }


@pytest.mark.parametrize("name", scripts())
def test_a_shell_reads_it_and_its_commands_are_ours(name):
    script = scripts()[name]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True)
    for extras in re.findall(r"'\.\[([\w,-]+)\]'", script):
        known = importlib.metadata.metadata("danceopd").get_all("Provides-Extra")
        assert set(extras.split(",")) <= set(known)
    for command in re.findall(r"^\s*train\.py (.*(?:\\\n.*)*)", script, re.MULTILINE):
        args = build_parser().parse_args(["train", *shlex.split(command.replace("\\\n", " "))])
        assert (ROOT / args.deepspeed).is_file()


def test_the_dockerfile_has_dockers_instructions():
    names = [name for name, _ in layers()]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}


def test_the_recipe_has_apptainers_sections():
    recipe = sections()
    assert set(recipe) == {"", "files", "post", "runscript", "test"}
    assert re.search(r"^Bootstrap: docker\nFrom: \S+$", recipe[""], re.MULTILINE)


def test_the_task_has_skypilots_keys():
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"])
    assert (ROOT / task["envs"]["CONFIG"]).is_file()


def test_slurm_reads_its_options_before_the_first_command():
    lines = (CLUSTER / "train.sbatch").read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert lines[0] == "#!/bin/bash"
    assert all(line.startswith("#") for line in lines[: options[-1]])
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", lines[i]) for i in options)
