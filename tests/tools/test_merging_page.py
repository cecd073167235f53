"""docs/merging.md: its commands are read by the parser, and its Python fits what is there."""

import inspect
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

from danceopd.cli.parser import build_parser
from danceopd.models.lora_merges import KEPT
from danceopd.tools.merge_loras import Options, merge_loras
from danceopd.tools.merge_loras.counts import SCORINGS
from danceopd.tools.merge_loras.gaps import GROWTH
from danceopd.tools.merge_loras.prompts import BASE, PAIRS

TEXT = (Path(__file__).parents[2] / "docs" / "merging.md").read_text(encoding="utf-8")


def test_every_command_is_read():
    blocks = re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert lines
    for line in lines:
        name, *words = shlex.split(line)
        assert name == "danceopd"
        if words[:2] == ["evaluate", "geneval"]:
            words[:2] = ["evaluate geneval"]
        args = build_parser().parse_args(words)
        if args.command == "merge-loras":
            loras = [text for text in args.inputs if "=" not in text]
            assert len(loras) == 2


def test_the_python_fits(monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    signature, called = inspect.signature(merge_loras), []

    def merge(*args):
        called.append(signature.bind(*args).arguments)
        return SimpleNamespace(results=SimpleNamespace(verdict="better"))

    monkeypatch.setattr("danceopd.tools.merge_loras.merge_loras", merge)
    exec(block, {})
    assert called[0]["options"] == Options(rank="auto", weights=["oil=0.8"])
    assert capsys.readouterr().out == "better\n"


def test_its_numbers_are_those_of_the_code():
    assert (BASE, PAIRS, KEPT, GROWTH, SCORINGS, Options().patience) == (0.2, 0.2, 0.95, 0.005, 20, 4)
