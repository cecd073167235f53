"""Says where an exported model comes from: its base, the words that call it, its sources by their hashes."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from danceopd.config.sections import Config
from danceopd.models.fingerprint import fingerprint
from danceopd.models.loading import hub_id
from danceopd.models.lora_files import lora_file
from danceopd.models.tensor_files import opened
from danceopd.support.errors import UserError
from danceopd.support.paths import shipped

TRIGGERS = ("modelspec.trigger_phrase", "trigger_words")  # where LoRA files name the words that call them


def provenance(config: Config, triggers: Sequence[str] = ()) -> dict[str, str]:
    """Collects the metadata of an exported file.

    Args:
        config: The run's.
        triggers: The words that call it; those that the sources' own files name if not given.

    Returns:
        base_model, as `base_name` gives it; trigger_words, also as modelspec.trigger_phrase, where there are
        some; and sources as JSON: {source: {file: "sha256:..."}}, of folders "files:..." by names, sizes and ends, and
        "missing" for what is no longer there.
    """
    sources: dict[str, dict[str, str]] = {}
    words = dict.fromkeys(triggers)
    for name, source in config.networks().items():
        paths = [lora.path for lora in source.lora]
        paths += [Path(source.weights)] if source.weights not in (None, "base") else []
        sources[name] = {path.name: content_hash(path) for path in paths}
        for lora in source.lora if not triggers else ():
            words |= dict.fromkeys(own_triggers(lora.path))
    return {**named(Path(str(config.model)), words), "sources": json.dumps(sources)}


def named(model: Path, words: Iterable[str]) -> dict[str, str]:
    """Names a file's base and the words that call it.

    Args:
        model: The base's folder.
        words: The words.

    Returns:
        base_model, and where there are words trigger_words and modelspec.trigger_phrase.
    """
    found, joined = {"base_model": base_name(model)}, ", ".join(words)
    return found | dict.fromkeys(TRIGGERS, joined) if joined else found


def base_name(model: Path) -> str:
    """Names a pipeline's folder as others find it: by its hub id, by the name that ships, or by the folder's own."""
    model = shipped(model).resolve()
    ships = model == shipped(Path("miniature")).resolve()
    return hub_id(model) or ("miniature" if ships else model.name)


def content_hash(path: Path) -> str:
    """Names the content of a file, a folder with one LoRA, or a transformer's folder."""
    try:
        path = lora_file(path)
    except UserError:
        pass
    if path.is_file():
        with open(path, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return f"files:{fingerprint(path)}" if path.is_dir() else "missing"


def own_triggers(path: Path) -> list[str]:
    """Reads the words that a LoRA's own file names; none where it names none or is no longer there."""
    try:
        with opened(lora_file(path)) as stored:
            metadata = stored.metadata() or {}
    except UserError:
        return []
    return [metadata[key] for key in TRIGGERS if metadata.get(key)][:1]
