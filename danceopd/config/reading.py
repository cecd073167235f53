"""Reads a configuration from YAML, with overrides."""

import os
import re
from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import ValidationError

from danceopd.config.checks import EXTENDS, _cross_check, mistakes
from danceopd.config.sections import Config
from danceopd.support.errors import UserError
from danceopd.support.paths import near_config, shipped_config
from danceopd.support.texts import read_text

LARGEST = 200_000  # keys and values of a configuration, those counted again that stand behind an alias

PLAIN = {  # what stands without quotes and is no text: its pattern, and the characters that it may begin with
    "bool": (r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$", "-+0123456789"),
    "float": (
        r"(([-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        "-+.0123456789",
    ),
}

HALF = re.compile("[\0\ud800-\udfff]")  # what stands in no file and no file's name


def load_config(path: Path | str, overrides: list[str] = ()) -> Config:
    """Reads a YAML file, applies overrides, and checks everything that needs no other file.

    Args:
        path: The file, or configs/... of those that ship where there is none here; its `extends` may name another one,
            by a path that starts from its own folder, whose values are its own where it gives no others.
        overrides: `key.sub=value`, each value as YAML.

    Raises:
        UserError: Lists every mistake with its key, and for an unknown key the nearest valid one.
    """
    return parse_config(_read_file(shipped_config(Path(path)), ()), overrides, str(path))


def _read_file(path: Path, extended_by: tuple[Path, ...]) -> object:
    """Reads the values of a file over those of the file that it extends; extended_by: those that led here."""
    at = f" (which {extended_by[-1]} extends)" if extended_by else ""
    if path.resolve() in [other.resolve() for other in extended_by]:
        raise UserError(f"{' extends '.join(map(str, (*extended_by, path)))}: a circle; let one of them extend nothing")
    if not path.exists():
        raise UserError(f"no configuration at {path}{at}{near_config(path)}")
    try:
        raw = read_yaml(read_text(path, "configuration"))
    except ValueError as error:
        raise UserError(f"cannot read {path}{at}: {error}") from None
    if at and not isinstance(raw, dict):
        raise UserError(f"{path}{at} {_no_mapping(raw)}")
    if not isinstance(raw, dict) or EXTENDS not in raw:
        return raw
    named = raw.pop(EXTENDS)
    if not isinstance(named, str) or not named:
        raise UserError(f"{path}: {EXTENDS} must be the path of one file, found {named!r}")
    return _over(_read_file(path.parent / os.path.expanduser(named), (*extended_by, path)), raw)


def _over(below: dict, above: dict) -> dict:
    """Lays values over others, in mappings key by key."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _over(result[key], value) if both else value
    return result


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values; a key that stands twice in one mapping is an error, and not the last of them the value.

    PyYAML reads YAML 1.1: on and no as booleans, 010 as 8, 1:30 as 90, 2026-01-01 as no text. Here they are texts, of
    which a number's field makes the number that they look like.
    """

    yaml_implicit_resolvers: ClassVar = {  # by first character
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in (*PLAIN, "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # such as of a number with too many digits
            if not isinstance(node, yaml.ScalarNode):
                raise
            raise ValueError(
                f"{node.value[:40]!r} in line {node.start_mark.line + 1}: {error}; put it in quotes"
            ) from None

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:  # merged mappings, whose keys may be given anew, are not among them yet
            if isinstance(key, yaml.ScalarNode):
                merge = key.tag == "tag:yaml.org,2002:merge"
                name, line = key.value if merge else self.construct_object(key), key.start_mark.line + 1
                if name in lines:
                    raise ValueError(f"the key {key.value!r} stands twice, in lines {lines[name]} and {line}; keep one")
                lines[name] = line
        return node


for _name, (_pattern, _first) in PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))


def read_yaml(text: str) -> object:
    """Reads plain values from YAML.

    Raises:
        ValueError: It is no YAML, has a key twice, a wrong date, a null character, nests too deep, or is too large.
    """
    try:
        found = yaml.load(text, _Loader)  # Safe: it is a SafeLoader.
        if _count(found, {}) > LARGEST:
            raise ValueError(f"it holds over {LARGEST} keys and values, those behind its aliases counted each time")
    except RecursionError:
        raise ValueError("it nests too deep, or in itself") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"it is not YAML{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return found


def _no_mapping(raw: object) -> str:
    """Says what a file holds in the place of keys and values."""
    if raw is None:
        return "is empty; a configuration has keys and values, as configs/demo.yaml has"
    kind = "a list" if isinstance(raw, list) else f"the value {str(raw)[:40]!r} alone"
    return f"holds {kind}; a configuration has keys and values, as configs/demo.yaml has"


def _count(value: object, known: dict[int, int]) -> int:
    """Counts the values in a value; known: earlier counts, by id, since a few aliases can stand for millions."""
    if isinstance(value, int) and value.bit_length() > 1000:
        raise ValueError("it holds a number of more than 300 digits")
    if isinstance(value, str) and HALF.search(value):
        raise ValueError(f"{value[:40]!r} holds a null character, or half of one (a lone surrogate)")
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inside)
    return known[id(value)]


def _at_home(value: object) -> object:
    """Copies a configuration with the home folder for ~ at the beginning of its texts, all of them names or paths."""
    if isinstance(value, dict):
        return {key: _at_home(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def read_run_config(folder: Path) -> Config:
    """Reads the configuration that a training wrote into its folder.

    Raises:
        UserError: The folder holds no run.
    """
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds no run (no config.yaml); give the output_dir of a training")
    return load_config(folder / "config.yaml")


def parse_config(raw: dict, overrides: list[str] = (), name: str = "configuration") -> Config:
    """Checks a configuration given as plain values.

    Args:
        raw: A mapping of keys to values.
        overrides: As for load_config.
        name: What messages call it.

    Raises:
        UserError: As load_config does.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{name} {_no_mapping(raw)}")
    raw = _at_home(raw)  # each part by itself too: an override must not reach what an alias shares
    for override in overrides:
        _override(raw, override)
    if EXTENDS in raw:
        raise UserError(f"{name}: {EXTENDS} stands in a file alone, and names one that its values are laid over")
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_list(name, mistakes(error))) from None
    problems = _cross_check(config)
    if problems:
        raise UserError(_list(name, problems))
    return config


def _list(name: str, problems: list[str]) -> str:
    count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
    return "\n  ".join([f"{name} has {count}:", *problems])


def _override(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not of the form key.sub=value")
    try:
        parsed = read_yaml(value)
    except ValueError as error:
        raise UserError(f"the value of override {override!r} is not YAML: {error}") from None
    if isinstance(parsed, str):  # YAML 1.1 reads 5e-4 as text
        try:
            parsed = float(parsed)
        except ValueError:
            pass
    parsed = _at_home(parsed)
    *parents, last = key.strip().split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} holds a value, not keys")
    node[last] = parsed
