"""Finds models and LoRAs that a user names by their id on the Hugging Face hub: owner/repo, @revision, :file."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from danceopd.support.hints import did_you_mean
from danceopd.support.paths import near_path, shipped

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<file>[^@:]+\.safetensors))?(@(?P<revision>[\w./-]+))?"
)

# What a pipeline's or a LoRA's folder is read from; never weights as pickles, nor code.
_READ = (".safetensors", ".json", ".txt", ".model", ".jinja")

# Files that say that a repository is a pipeline, or an adapter, and is there.
_HEADS = ("model_index.json", "modular_model_index.json", "adapter_model.safetensors")
_HEADS += ("pytorch_lora_weights.safetensors",)

SECONDS = 20.0  # until a hub that does not answer is given up

_allowed: ContextVar[bool] = ContextVar("downloads", default=False)


@dataclass(frozen=True)
class HubName:
    """A repository of the hub.

    Attributes:
        repo: owner/name.
        file: One file of it; None for all that a pipeline needs.
        revision: A branch, tag or commit; None for the main one.
    """

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo + (f":{self.file}" if self.file else "") + (f"@{self.revision}" if self.revision else "")


def hub_name(path: Path | str) -> HubName | None:
    """Reads owner/repo, owner/repo@revision or owner/repo:file.safetensors@revision; None for any other path."""
    match = _ID.fullmatch(str(path))
    if not match or ".." in str(path):
        return None
    return HubName(match["repo"], match["file"], match["revision"])


@contextmanager
def downloads(allowed: bool = True) -> Iterator[None]:
    """Says whether `located` may download within this context."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def located(path: Path) -> Path:
    """Returns where a model or a LoRA lies.

    Args:
        path: A path, a name that ships (support.paths.shipped), or an id of the hub.

    Returns:
        What is there under the path; else what ships under the name; else what the hub's cache holds, or what was
        downloaded into it, within `downloads`; else the path as it is.

    Raises:
        ValueError: The hub has no such repository, revision or file, does not give it, or cannot be reached.
    """
    path = shipped(path)
    name = None if path.exists() else hub_name(path)
    if name is None:
        return path
    if _allowed.get():
        return _downloaded(name)
    return _cached(name) or path


def _cached(name: HubName) -> Path | None:
    """Returns the folder or file in the hub's cache; what a folder lacks is said by who reads it."""
    for file in (name.file,) if name.file else _HEADS:
        found = huggingface_hub.try_to_load_from_cache(name.repo, file, revision=name.revision)
        if isinstance(found, str):
            return Path(found) if name.file else Path(found).parent
    return None


def _downloaded(name: HubName) -> Path:
    try:
        if name.file:
            if name.file.endswith("adapter_model.safetensors"):  # PEFT's, whose scale stands beside it
                _beside(name, "adapter_config.json")
            return Path(huggingface_hub.hf_hub_download(name.repo, name.file, revision=name.revision))
        there = huggingface_hub.HfApi().model_info(name.repo, revision=name.revision, timeout=SECONDS)
        files = wanted([one.rfilename for one in there.siblings or []])
        return Path(huggingface_hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=files))
    except GatedRepoError:
        raise ValueError(
            f"{name} asks for its licence to be accepted: open https://huggingface.co/{name.repo}, accept it, and give "
            "your token with `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        missing = {RevisionNotFoundError: "revision", RemoteEntryNotFoundError: "file"}.get(type(error), "repository")
        raise ValueError(f"there is no {name} here, and the hub has no such {missing}{_like(str(name))}") from None
    except Exception as error:  # the HTTP library's, which is another for each version of the hub's client
        if cached := _cached(name):
            return cached
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"there is no {name} here, and the hub does not answer: {said}{_like(str(name))}") from None


def _beside(name: HubName, other: str) -> None:
    """Downloads another file of a file's folder; who reads the file says where it is missing."""
    with suppress(RemoteEntryNotFoundError):
        folder = str(name.file).rpartition("/")[0]
        huggingface_hub.hf_hub_download(name.repo, f"{folder}/{other}".lstrip("/"), revision=name.revision)


def wanted(files: list[str]) -> list[str]:
    """Chooses the files that are read of a repository.

    Those are the parts of a pipeline in their folders, not the whole checkpoint that often lies beside them, and not
    the halved variant of weights that are there in full.
    """
    parts = [file for file in files if file.endswith(_READ)]
    if any(file.endswith("model_index.json") for file in parts):
        parts = [file for file in parts if "/" in file or not file.endswith(".safetensors")]
    return [file for file in parts if re.sub(r"\.(fp16|bf16)(?=[.-])", "", file) == file or _alone(file, parts)]


def _alone(file: str, files: list[str]) -> bool:
    """Tells whether a variant's folder holds weights of that variant only."""
    folder = file.rpartition("/")[0]
    weights = [f for f in files if f.endswith(".safetensors") and f.rpartition("/")[0] == folder]
    return all(re.search(r"\.(fp16|bf16)[.-]", f) for f in weights)


def near(path: Path | str) -> str:
    """Ends a message about a path that is not there by a name that is like it, beside it or in the hub's cache."""
    path = Path(path)
    if re.match("https?:", str(path)):
        return "; of the hub give owner/repo, or owner/repo:file.safetensors, and no address"
    if found := _like(path):
        return found
    return "; if it is meant as a repository of the hub, --download brings it" if hub_name(path) else ""


def _like(path: Path | str) -> str:
    """Ends a message by a path or a repository of the cache that is like this one; "" for none."""
    return near_path(path) or near_cached(path)


def near_cached(name: Path | str) -> str:
    """Ends a message about what is not there by the nearest repository of the hub's cache; "" for none."""
    named = hub_name(name)
    if named is None:
        return ""
    try:
        cached = [repo.repo_id for repo in huggingface_hub.scan_cache_dir().repos]
    except (huggingface_hub.errors.CacheNotFound, OSError, ValueError):
        cached = []
    return did_you_mean(named.repo, cached, "")
