"""Tokenizes by byte-level BPE, trained on the prompts of the picture world; any text encodes."""

from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

PATH = Path(__file__).parent / "assets" / "tokenizer.json"


@lru_cache(maxsize=1)
def load_tokenizer() -> Tokenizer:
    """Loads the tokenizer that ships with the package."""
    return Tokenizer.from_file(str(PATH))


@lru_cache(maxsize=65536)
def _ids(prompt: str, length: int) -> tuple[int, ...]:
    ids = load_tokenizer().encode(prompt).ids[:length]
    return (*ids, *[load_tokenizer().token_to_id("<pad>")] * (length - len(ids)))


def tokenize(prompts: list[str], length: int) -> torch.Tensor:
    """Tokenizes prompts: [B, length] int64, padded or cut to `length`. The empty prompt is all padding."""
    return torch.tensor([_ids(prompt, length) for prompt in prompts], dtype=torch.int64).view(-1, length)


def count_tokens(prompt: str) -> int:
    """Returns the number of a prompt's tokens before it is padded or cut."""
    return len(load_tokenizer().encode(prompt).ids)
