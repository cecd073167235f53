"""Makes batches of the embedded network."""

from collections.abc import Sequence

import torch

from danceopd.core.conditioning import Conditioning
from danceopd.data.sampler import Group, Samples
from danceopd.support.texts import columns_of, filled
from danceopd.world.tokenizer import tokenize


def make_conditioning(
    prompts: list[str], source: torch.Tensor | None, text_length: int, texts: dict[str, list[str]] | None = None
) -> Conditioning:
    """Tokenizes prompts and attaches their source pictures [B, 3, H, W] (or None).

    texts: What sources are asked with in the place of the prompts, by name.
    """
    own = {name: tokenize(said, text_length) for name, said in (texts or {}).items()}
    marks = torch.full((len(prompts),), source is not None)
    return Conditioning(tokenize(prompts, text_length), source, marks, texts=own or None)


def embedded_samples(
    data: list, text_length: int, image_size: int, texts: Sequence[Sequence[str]] | None = None
) -> Samples:
    """Makes samples of one picture size, whose prompts are tokenized as they are drawn.

    Args:
        data: The rows of each capability.
        text_length: Tokens of a prompt.
        image_size: Sides in pixels.
        texts: What each capability's source is asked with in the place of a row's prompt, filled from its columns.
    """
    own = {id(rows): said for rows, said in zip(data, texts or [()] * len(data), strict=True)}

    def condition(rows, indices, without_prompt):
        prompts = ["" if empty else p for p, empty in zip(rows.prompts(indices), without_prompt, strict=True)]
        columns = rows.columns(indices) if own[id(rows)] else ()
        said = {text: _said(text, columns, without_prompt) for text in own[id(rows)]}
        return make_conditioning(prompts, rows.sources(indices), text_length, said)

    return Samples([Group(data, (3, image_size, image_size), sum(map(len, data)))], condition)


def _said(text: str, columns: list[dict[str, str]], without_prompt: list[bool]) -> list[str]:
    """Fills a text in for each row; where a prompt is left out, so is what is made of it."""
    left_out = [empty and bool(columns_of(text)) for empty in without_prompt]
    return ["" if empty else filled(text, own) for own, empty in zip(columns, left_out, strict=True)]


def check_texts(rows, texts: Sequence[str]) -> None:
    """Raises ValueError where rows lack a column that one of the texts takes."""
    for own in rows.columns(range(len(rows))) if texts else ():
        for text in texts:
            filled(text, own)
