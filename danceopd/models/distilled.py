"""Recognises networks that were distilled to a few steps, which on-policy distillation cannot start from."""

import re
from pathlib import Path
from types import ModuleType

from danceopd.models.loading import read_json, transformer_folder
from danceopd.support.errors import UserError

NAMES = re.compile(
    r"turbo|schnell|lightning|hyper-?(sd|flux)|(?<!de-)(?<!un)distill?ed|(?<![a-z])(lcm|dmd|tdm|flash)(?![a-z])"
    r"|(?<!\d)[1-8][-_ ]?steps?(?![a-z])",
    re.IGNORECASE,
)

FEW = 12  # noise levels that a pipeline names as its own, where it was distilled to them


def why_distilled(weights: Path | str, backbone: ModuleType) -> str | None:
    """Finds what shows that a network was distilled to a few steps.

    Args:
        weights: A pipeline's folder, a transformer's own, or a transformer's file.
        backbone: The module of its family.

    Returns:
        In words, or None where nothing shows it.
    """
    folder = Path(weights)
    index, scheduler = _values(folder / "model_index.json"), _values(folder / "scheduler" / "scheduler_config.json")
    if index.get("is_distilled"):
        return "is_distilled in its model_index.json"
    for name in _names(folder, index):
        if found := NAMES.search(name):
            return f"{found[0]!r} in its name {name}"
        word = getattr(backbone, "DISTILLED_WITHOUT_BASE", None)
        if word and "is_distilled" not in index and word in name.lower() and "base" not in name.lower():
            return f"its name {name}, without 'base'"
    if len(sigmas := index.get("sample_sigmas") or ()) in range(1, FEW + 1):
        return f"{len(sigmas)} noise levels of its own in its model_index.json"
    if "LCM" in str(scheduler.get("_class_name")) or scheduler.get("stochastic_sampling"):
        return "its scheduler, which adds new noise after each step"
    own = getattr(backbone, "distilled_scheduler", None)  # what shows it in this family alone
    return own(folder, scheduler) if own and scheduler else None


def _names(folder: Path, index: dict) -> list[str]:
    """Lists what a network is called: by its folder, by a cache of the hub, and where it was saved from."""
    transformer = _values(transformer_folder(folder) / "config.json") if folder.is_dir() else {}
    path = folder.resolve()
    named = [part.rpartition("--")[2] for part in path.parts if part.startswith("models--")]
    named = named or [path.parent.name if path.name == "transformer" else path.name]
    origins = [str(values.get("_name_or_path") or "") for values in (index, transformer)]
    return [*named, *(Path(origin).name for origin in origins if origin)]


def _values(path: Path) -> dict:
    """Reads a JSON file; nothing where it is not there or is damaged, which others say."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}
