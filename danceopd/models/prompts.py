"""Reads prompts as a model's tokenizers do: how long they are, and what of them is a special token."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reader:
    """One tokenizer of a model.

    Attributes:
        name: The folder that it lies in.
        limit: Tokens that its encoder takes; None where it cuts nothing.
        lengths: Counts the tokens of prompts, with all that the pipeline puts around them.
        special: The texts that it reads as one token each.
    """

    name: str
    limit: int | None
    lengths: Callable[[list[str]], list[int]]
    special: tuple[str, ...]


def reader(name: str, tokenizer, limit: int | None, around: Callable[[str], str] = str, drop: int = 0) -> Reader:
    """Makes the Reader of a tokenizer that takes prompts as texts.

    Args:
        name: The folder that it lies in.
        tokenizer: Of transformers.
        limit: Tokens that the encoder takes; None where it cuts nothing.
        around: Puts a prompt into the pipeline's template.
        drop: Tokens of the template that are taken off again.

    Returns:
        The Reader.
    """

    def lengths(prompts: list[str]) -> list[int]:
        counted = []
        for start in range(0, len(prompts), 1000):
            texts = [around(prompt) for prompt in prompts[start : start + 1000]]
            counted += [len(ids) - drop for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        return counted

    return Reader(name, limit, lengths, special_tokens(tokenizer))


def chat_reader(tokenizer, limit: int, **options) -> Reader:
    """Makes the Reader of a tokenizer whose chat template holds the prompt as the user's message.

    Args:
        tokenizer: Of transformers.
        limit: Tokens that the encoder takes.
        options: Of the template.

    Returns:
        The Reader.
    """

    def around(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    return reader("tokenizer", tokenizer, limit, around)


def special_tokens(tokenizer) -> tuple[str, ...]:
    """Lists the texts that a tokenizer of transformers reads as one token each."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
