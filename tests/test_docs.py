"""The pages of README and docs: what is generated is up to date, links lead somewhere, and commands are as they say."""

import ast
import re
import shlex

import make_reference
import pytest
import torch
import yaml
from pages import BLOCK, ROOT, blocks

from danceopd.cli.parser import build_parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """The anchors of a page's headings, as forges and MkDocs make them."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_references_are_up_to_date():
    for name in ("configuration", "commands"):
        page = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
        assert page == getattr(make_reference, name)(), "make docs writes it again"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if page.parent.name == "docs":  # which is all that the site has
            assert there.is_relative_to(page.parent), f"{page.name}: {target} is not in the site"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_every_page_is_in_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    entries = [
        entry for part in site["nav"] for entry in (next(iter(part.values())) if isinstance(part, dict) else [part])
    ]
    listed = {next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries}
    assert listed == {page.name for page in PAGES[1:]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_as_they_say(page):
    parser = build_parser()
    for block in blocks(page, "", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("danceopd ") or "..." in line:
                continue
            words = shlex.split(line.split(" > ")[0], comments=True)
            if words[1:3] in (["evaluate", "geneval"], ["evaluate", "gedit"], ["evaluate", "reward"]):
                words[1:3] = [" ".join(words[1:3])]
            if "--help" in words:
                continue
            config = getattr(parser.parse_args(words[1:]), "config", None)
            if config is not None and str(config).startswith("configs/"):
                assert (ROOT / config).is_file(), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python(page):
    for block in blocks(page, "python") if page.name != "api.md" else ():  # its examples run in tests/test_face.py
        ast.parse(block)


def test_the_kernels_snippet_runs():
    (snippet,) = blocks(ROOT / "docs" / "start-kernels.md", "python")
    names = {}
    exec(snippet, names)
    teachers, route, student = (names[name] for name in ("teachers", "route", "student"))
    target = torch.stack(teachers)[route, torch.arange(4)]
    torch.testing.assert_close(names["loss"], (student.detach() - target).square().mean())
