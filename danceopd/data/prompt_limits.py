"""Finds prompts that a model's tokenizers do not take as written: cut at a limit, or holding special tokens."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from danceopd.models.prompts import Reader
from danceopd.support.texts import excerpt, many, some

SHORTEST = 3  # characters of a special token that is looked for: one tokenizer pads with "!"


def look_at_prompts(
    backbone: ModuleType, model: Path, prompts: list[str], max_sequence_length: int
) -> tuple[dict[str, dict], dict[str, int]]:
    """Finds what the tokenizers of a model change.

    Args:
        backbone: The model's family.
        model: Its pipeline's folder.
        prompts: Each once.
        max_sequence_length: As for the family's text_encoder.

    Returns:
        {prompt: {"cut": names of the tokenizers that it is longer than, "special": special tokens in it}} of the
        prompts that have any, and the limit of each tokenizer.
    """
    found: dict[str, dict] = {}
    readers: list[Reader] = backbone.prompt_readers(model, max_sequence_length)
    for reader in readers:
        if reader.limit is not None:
            for prompt, length in zip(prompts, reader.lengths(prompts), strict=True):
                if length > reader.limit:
                    found.setdefault(prompt, {}).setdefault("cut", []).append(reader.name)
        tokens = [token for token in reader.special if len(token) >= SHORTEST]
        pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")
        for prompt in prompts:
            if held := pattern.findall(prompt):
                own = found.setdefault(prompt, {}).setdefault("special", [])
                own += [token for token in dict.fromkeys(held) if token not in own]
    return found, {reader.name: reader.limit for reader in readers if reader.limit is not None}


def notes_before(
    backbone: ModuleType, model: Path, prompts: Sequence[tuple[str, str]], max_sequence_length: int
) -> list[str]:
    """Says what the tokenizers of a model would change of prompts that are not prepared yet.

    Args:
        backbone, model, max_sequence_length: As look_at_prompts takes them.
        prompts: (what a line calls it, the prompt); the prompt's own beginning where nothing else names it.

    Returns:
        The lines of prompt_notes.
    """
    each = list(dict.fromkeys(prompt for _, prompt in prompts))
    found, limits = look_at_prompts(backbone, model, each, max_sequence_length)
    return prompt_notes(
        [{"id": name or repr(excerpt(prompt)), **found.get(prompt, {})} for name, prompt in prompts], limits
    )


def prompt_notes(rows: list[dict], limits: dict[str, int]) -> list[str]:
    """Says of prepared rows what look_at_prompts found, a line for each tokenizer and one for special tokens."""
    lines = []
    for name, limit in limits.items():
        if cut := [str(row["id"]) for row in rows if name in row.get("cut", ())]:
            lines.append(
                f"of {many(len(rows), 'prompt')} {many(len(cut), 'is', 'are')} longer than the {limit} tokens of "
                f"{name} and cut there: {some(cut)}"
            )
    if special := [str(row["id"]) for row in rows if row.get("special")]:
        tokens = dict.fromkeys(token for row in rows for token in row.get("special", ()))
        lines.append(
            f"of {many(len(rows), 'prompt')} {many(len(special), 'holds', 'hold')} special tokens, read as such and "
            f"not as text ({some(list(tokens))}): {some(special)}"
        )
    return lines
