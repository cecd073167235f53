"""Writes configuration.md and commands.md from the code: python docs/make_reference.py, or make docs."""

import argparse
import re
import textwrap
import types
import typing
from pathlib import Path

import pydantic

from danceopd.cli.parser import build_parser
from danceopd.config import sections
from danceopd.config.methods import options
from danceopd.config.section import Section
from danceopd.core.methods import METHODS

DOCS = Path(__file__).parent

CONFIGURATION = """# Configuration

Every key of a run's YAML file, made from the code by `make docs`. A file may say `extends: OTHER.yaml` and give only
what differs. Mistakes are all told at once, each with the nearest valid key; `danceopd train --config FILE --dry-run`
checks everything that training opens. On the command line a key is `section.key=value`.
"""

COMMANDS = """# Commands

What each command takes, made from the code by `make docs`; `danceopd COMMAND --help` prints the same.
"""


def type_of(annotation: object) -> str:
    """Writes a field's type in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        limits = [str(limit) for one in arguments[1:] for limit in getattr(one, "metadata", [])]
        return " ".join([type_of(arguments[0]), *map(_limit, limits)]).strip()
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join(type_of(one) for one in arguments if one is not type(None))
    if origin is list:
        return f"list of {type_of(arguments[0])}"
    if origin is dict:
        return f"{type_of(arguments[1])} by name"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "`true` \\| `false`", "Path": "path"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)


def _limit(text: str) -> str:
    signs = {"Gt": ">", "Ge": "≥", "Lt": "<", "Le": "≤"}
    found = re.match(r"(Gt|Ge|Lt|Le)\(\w+=(.*)\)", text)
    return f"{signs[found[1]]} {found[2]}" if found else ""


def default_of(field: pydantic.fields.FieldInfo) -> str:
    """Writes a field's default."""
    if field.is_required():
        return "**required**"
    value = field.default
    if value is None or isinstance(value, Section):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def configuration() -> str:
    """Writes configuration.md."""
    parts = [CONFIGURATION.strip()]
    written: set[type] = set()
    waiting = [("", sections.Config)]
    while waiting:
        path, section = waiting.pop(0)
        if section in written:
            continue
        written.add(section)
        prose, meanings = _read(section.__doc__ or "")
        lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        inside: list[tuple[str, type]] = []
        for key, field in section.model_fields.items():
            value = type_of(_whole(field))
            for inner in _sections_in(field.annotation):
                where = f"{path}{key}" + (".NAME" if typing.get_origin(field.annotation) is dict else "")
                inside.append((f"{where}.", inner))
                value = f"section `{where}`" if inner not in written else f"as {inner.__name__}"
            lines.append(
                f"| `{key}` | {value} | {default_of(field)} | {meanings.get(key, '').replace('|', chr(92) + '|')} |"
            )
        waiting[:0] = inside
        title = f"## `{path.removesuffix('.')}`" if path else "## The file"
        parts += [title, prose, "\n".join(lines)]
    parts.append("## `options`\n\nThe options of each method.")
    for method in METHODS:
        fields = options(method).model_fields
        rows = [f"| `{key}` | {type_of(_whole(f))} | {default_of(f)} |" for key, f in fields.items()]
        table = "\n".join(["| key | value | default |", "| --- | --- | --- |", *rows]) if rows else "It has none."
        parts.append(f"### `{method}`\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _whole(field: pydantic.fields.FieldInfo) -> object:
    return typing.Annotated[field.annotation, field] if field.metadata else field.annotation


def _sections_in(annotation: object) -> list[type]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for one in typing.get_args(annotation) for section in _sections_in(one)]


def _read(docstring: str) -> tuple[str, dict[str, str]]:
    """Splits a section's docstring into its paragraphs and what it says of each key."""
    head, _, rest = textwrap.dedent(f"    {docstring}").partition("Attributes:")
    entries: list[str] = []
    for line in rest.splitlines():
        if re.match(r" {4}\S", line):
            entries.append(line.strip())
        elif line.strip():
            entries[-1] += f" {line.strip()}"
    meanings = {}
    for entry in entries:
        keys, _, meaning = entry.partition(": ")
        meanings |= dict.fromkeys(keys.split(", "), meaning)
    paragraphs = [" ".join(part.split()) for part in head.strip().split("\n\n")]
    return "\n\n".join(paragraphs), meanings


def commands() -> str:
    """Writes commands.md."""
    parser = build_parser()
    (choices,) = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parts = [COMMANDS.strip()]
    for name, command in dict(choices).items():
        parts.append(f"## danceopd {name}\n\n```text\n{_help(command)}\n```")
        for action in command._actions:
            if isinstance(action, argparse._SubParsersAction):
                inner = (f"### danceopd {name} {one}\n\n```text\n{_help(c)}\n```" for one, c in action.choices.items())
                parts += inner
    return "\n\n".join(parts) + "\n"


def _help(command: argparse.ArgumentParser) -> str:
    command.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    return command.format_help().strip()


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(configuration(), encoding="utf-8")
    (DOCS / "commands.md").write_text(commands(), encoding="utf-8")
