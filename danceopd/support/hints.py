"""Finds the nearest valid word for a wrong one."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, valid: Iterable, otherwise: str | None = None) -> str:
    """Ends a message about a word that is not valid.

    Args:
        word: What was given.
        valid: What could have been.
        otherwise: What is said where none of them is near; a list of them all if not given.

    Returns:
        "; did you mean 'edit'?", or "; valid are edit, t2i".
    """
    words = sorted(map(str, valid))
    if near := difflib.get_close_matches(str(word), words, n=1, cutoff=0.5):
        return f"; did you mean {near[0]!r}?"
    return f"; valid are {', '.join(words)}" if otherwise is None else otherwise
