"""Writes docs/api.md from the docstrings of danceopd's stable names: python docs/make_api.py, or make docs."""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

import danceopd

HEAD = """# The stable names

What `import danceopd` gives; `make docs` writes this file from the docstrings. The examples take `import torch` and
`from danceopd import *` for granted. B is the number of samples, N the number of steps. Latents, states and velocities
are float tensors [B, ...], of whatever shape the fields take.

In the signatures `Tensors` is a tensor, or a dict or tuple of tensors; `Generator` is a torch.Generator; `Config` is a
checked configuration; `Matched` is a tuple (loss, error, velocity_norm, target_norm) of tensors [Q].
"""
SECTION = re.compile(r"^(Args|Returns|Raises|Example):\n((?:    .*\n|\n)+)", re.MULTILINE)
Definition = ast.FunctionDef | ast.ClassDef


def definition(name: str) -> tuple[Definition, str]:
    """Finds where a stable name is defined, and the source of its module."""
    source = inspect.getsource(sys.modules[getattr(danceopd, name).__module__])
    nodes = (node for node in ast.parse(source).body if isinstance(node, Definition))
    return next(node for node in nodes if node.name == name), source


def signature(node: Definition, source: str) -> str:
    """Takes a definition's first lines as they are written; a class with fields is called by them."""
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    if fields:
        return "\n".join([f"{node.name}(", *(f"    {ast.get_source_segment(source, f)}," for f in fields), ")"])
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return textwrap.dedent("\n".join(lines)).removesuffix(":")


def markdown(docstring: str) -> str:
    """Rewrites a docstring: sections by their names, arguments as a list, equations and examples as code."""
    docstring = docstring.replace("``", "`") + "\n"
    lead = SECTION.sub("", docstring).strip()
    parts = [re.sub(r"^    (.*)$", r"```\n\1\n```", lead, flags=re.MULTILINE)]
    for title, indented in SECTION.findall(docstring):
        body = textwrap.dedent(indented).strip()
        if title == "Example":
            body = f"```python\n{body}\n```"
        elif title in ("Args", "Raises"):
            body = re.sub(r"\n +", " ", body)  # one line each
            body = re.sub(r"^([\w, ]+): ", r"- `\1`: ", body, flags=re.MULTILINE)
        parts.append(f"**{title}**\n\n{body}")
    return "\n\n".join(parts)


def entry(node: Definition, source: str, title: str) -> str:
    """Writes one name, and under a class its public methods."""
    documented = markdown(ast.get_docstring(node) or "")
    parts = [f"{title}`", f"```python\n{signature(node, source)}\n```", documented]
    if isinstance(node, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and ast.get_docstring(part)]
        public = [m for m in methods if m.name == "__call__" or not m.name.startswith("_")]
        parts += [entry(method, source, f"#{title}.{method.name}") for method in public]
    return "\n\n".join(parts)


def api() -> str:
    """Writes the whole document."""
    found = {name: definition(name) for name in danceopd.__all__}
    written = {name: entry(*where, f"### `{name}") for name, where in found.items()}
    functions = [text for name, text in written.items() if isinstance(found[name][0], ast.FunctionDef)]
    classes = [text for text in written.values() if text not in functions]
    return "\n\n".join([HEAD.strip(), "## Functions", *functions, "## Types", *classes]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(api(), encoding="utf-8")
