"""The words that call a LoRA: what its file says of them, and prompts with them put in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from danceopd.models.lora_files import FILES
from danceopd.support.errors import UserError
from danceopd.support.texts import PROMPT, columns_of, parse_object

PHRASES = ("modelspec.trigger_phrase", "trigger_words", "trigger_phrase", "trigger_word", "instance_prompt")


@dataclass(frozen=True)
class Trigger:
    """How a LoRA is called in a prompt.

    Attributes:
        words: Stand in front of the prompt, or around "{prompt}" in them; "" where the LoRA acts on every prompt.
        known: Whether the LoRA itself is asked with the words. Words made from its name are the result's alone.
        origin: Who says so.
    """

    words: str
    known: bool
    origin: str

    def call(self, prompt: str) -> str:
        """Returns a prompt that calls the LoRA."""
        if PROMPT in self.words:
            return self.words.replace(PROMPT, prompt)
        return f"{self.words.rstrip(' ,')}, {prompt}" if self.words else prompt

    def phrase(self) -> str:
        """Returns the words alone, without the place of the prompt and the marks about it."""
        words = re.sub(r"[\s,;.:]*\{prompt\}[\s,;.:]*", lambda place: ", " if "," in place[0] else " ", self.words)
        return words.strip(" ,;.:")

    def stands_in(self, text: str) -> bool:
        """Tells whether a text calls the LoRA: the words are in it, what is in front of "{prompt}" before the rest."""
        parts = filter(None, (part.strip(" ,;.:") for part in self.words.split(PROMPT)))
        pattern = ".*".join(rf"(?<!\w){re.escape(part)}(?!\w)" for part in parts)
        return bool(pattern) and re.search(pattern, text, re.IGNORECASE | re.DOTALL) is not None


def phrases_of(triggers: Mapping[str, Trigger]) -> dict[str, str]:
    """Returns the phrases that call LoRAs, by name, of those that are called by words."""
    return {name: phrase for name, trigger in triggers.items() if (phrase := trigger.phrase())}


def trigger_of(name: str, path: Path, given: str | None) -> Trigger:
    """Finds what calls a LoRA: what is given, else what its file's metadata says, else its name.

    Args:
        name: What it is called here.
        path: Its file or folder.
        given: The user's words; None where there are none.

    Returns:
        The trigger.

    Raises:
        UserError: The given words have braces other than "{prompt}".
    """
    if given is not None:
        _check_braces(given)
        return Trigger(given.strip(), True, "--trigger")
    metadata = metadata_of(path)
    own = triggers_in(metadata)
    if len(own) == 1:
        return Trigger(*own.values(), True, "its file")
    if words := words_in(metadata):
        return Trigger(words, True, "its file")
    return Trigger(re.sub(r"[-_]+", " ", name), False, "its name")


def _check_braces(words: str) -> None:
    try:
        others = [column for column in columns_of(words) if column != "prompt"]
    except ValueError as error:
        raise UserError(str(error)) from None
    if others:
        raise UserError(f"{{{others[0]}}} is not known; {PROMPT} stands for the prompt")


def metadata_of(path: Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file, or of the only one or the usual one in a folder; {} without any."""
    files = [path]
    if path.is_dir():
        files = [path / name for name in FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    try:
        with safe_open(files[0], framework="pt") as file:
            return dict(file.metadata() or {})
    except (IndexError, OSError, SafetensorError):  # said where the LoRA itself is read
        return {}


def triggers_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns what calls the LoRAs that a merged file holds, by name, as this program writes it; {} of other files."""
    found = _table(metadata.get("triggers"))
    return {name: words for name, words in found.items() if isinstance(words, str) and words.strip() and _is_fit(words)}


def _is_fit(words: str) -> bool:
    try:
        _check_braces(words)
    except UserError:
        return False
    return True


def words_in(metadata: Mapping[str, str]) -> str | None:
    """Finds the words in a file's metadata.

    modelspec.trigger_phrase and names like it come first; then `ss_tag_frequency`, in which kohya's trainers count the
    captions' parts by folder (ai-toolkit writes its trigger word there): a part that is in every caption. Without
    captions kohya's folders, "10_ink style", are the captions.

    Args:
        metadata: The file's.

    Returns:
        The words; None where the metadata names none.
    """
    for key in PHRASES:
        if words := metadata.get(key, "").strip(" ,"):
            return words.replace("{", "").replace("}", "")
    counts, folders = (_table(metadata.get(key)) for key in ("ss_tag_frequency", "ss_dataset_dirs"))
    for folder, tags in counts.items():
        tags = {tag: n for tag, n in tags.items() if isinstance(n, int)} if isinstance(tags, dict) else {}
        pictures = folders.get(folder, {})
        pictures = pictures.get("img_count") if isinstance(pictures, dict) else None
        pictures = pictures if isinstance(pictures, int) else max(tags.values(), default=0)
        everywhere = [tag.strip() for tag, n in tags.items() if n >= pictures]
        # Where all parts are in all captions nothing says which of them is the trigger, unless there is only one.
        if everywhere and (len(tags) == 1 or len(everywhere) < len(tags)):
            return everywhere[0].replace("{", "").replace("}", "")
    if not any(counts.values()):
        names = [match[1] for folder in folders if (match := re.fullmatch(r"\d+_(.+)", folder))]
        return names[0].replace("_", " ").strip() if names else None
    return None


def _table(text: str | None) -> dict:
    """Reads a JSON object; {} for anything else."""
    try:
        return parse_object(text or "{}")
    except ValueError:
        return {}
