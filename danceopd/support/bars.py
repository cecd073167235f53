"""Shows how far long work is: a bar in a terminal, and a line now and then in a file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_A_LINE = 30.0


class _Lines(tqdm):
    """Writes a line of its own each time; nothing is erased, because a file keeps everything."""

    def display(self, msg=None, pos=None) -> bool:
        if msg != "" and self.n != getattr(self, "_said", None):
            self._said = self.n
            self.fp.write(f"{self}\n")
        return True

    def clear(self, nolock=False) -> None:
        """Leaves what is written."""

    def moveto(self, n) -> None:
        """Stays: lines only follow each other."""

    def close(self) -> None:
        """Writes the last state, once, and nothing that would erase it."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
            self.display()


def silenced() -> bool:
    """Tells whether nothing is to be shown: by TQDM_DISABLE=1, which --quiet sets."""
    return os.environ.get("TQDM_DISABLE", "0") not in ("", "0")


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Keeps the bars of diffusers and transformers off where none is to be shown, or where they would fill a file."""
    loaded = (sys.modules.get(f"{name}.utils.logging") for name in ("diffusers", "transformers"))
    active = [one for one in loaded if one and one.is_progress_bar_enabled()]
    if sys.stderr.isatty() and not silenced():
        active = []
    for one in active:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one in active:
            one.enable_progress_bar()


def bar(items=None, desc: str | None = None, total: float | None = None, disable: bool = False, **options) -> tqdm:
    """Makes tqdm's bar on the standard error, or lines every 30 seconds where that is no terminal.

    Args:
        items, desc, total, disable, options: As tqdm takes them; TQDM_DISABLE=1, which --quiet sets, disables all.

    Returns:
        The bar, which is an iterable of the items and a context.
    """
    disable = disable or silenced()
    if sys.stderr.isatty():
        return tqdm(items, desc, total, disable=disable, dynamic_ncols=True, **options)
    form = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    pace = {"mininterval": SECONDS_A_LINE, "maxinterval": SECONDS_A_LINE, "bar_format": form}
    return _Lines(items, desc, total, disable=disable, **{**options, **pace})
