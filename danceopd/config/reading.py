"""Reads a configuration from YAML, with overrides."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from danceopd.config.checks import _cross_check, _explain
from danceopd.config.sections import Config
from danceopd.support.errors import UserError
from danceopd.support.hints import did_you_mean


def load_config(path: Path | str, overrides: list[str] = ()) -> Config:
    """Reads a YAML file, applies overrides, and checks everything that needs no other file.

    Args:
        path: The file.
        overrides: `key.sub=value`, each value as YAML.

    Raises:
        UserError: Lists every mistake with its key, and for an unknown key the nearest valid one.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}{did_you_mean(path, path.parent.glob('*.y*ml'), '')}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return parse_config(raw, overrides, str(path))


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
        raw: A mapping of keys to values; the overrides are written into it.
        overrides: As for load_config.
        name: What messages call it.

    Raises:
        UserError: As load_config does.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{name} must be a mapping of keys to values, found {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_list(name, [_explain(item) for item in error.errors()])) from None
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
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not YAML: {error}") from None
    if isinstance(parsed, str):  # YAML 1.1 reads 5e-4 as text
        try:
            parsed = float(parsed)
        except ValueError:
            pass
    *parents, last = key.strip().split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} holds a value, not keys")
    node[last] = parsed
