"""Finds the nearest valid word for a wrong one."""

import difflib
from collections.abc import Iterable


def nearest(word: str, valid) -> str:
    """ "; did you mean x?", or the valid words where none is near."""
    valid = sorted(str(v) for v in valid)
    near = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; valid are {', '.join(valid)}"


def hint(name: str, known: Iterable[str]) -> str:
    """ "known: edit, t2i; did you mean edit?" for the error about an unknown name."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"known: {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")
