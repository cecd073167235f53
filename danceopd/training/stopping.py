"""Ends a run after the update at hand when a signal asks for it, and other commands as Ctrl-C does."""

import contextlib
import signal
import sys
import threading

from danceopd.support.errors import Terminated


@contextlib.contextmanager
def stop_requests(silent: bool = False):
    """Notes the first Ctrl-C or TERM signal; the second Ctrl-C interrupts at once.

    An update is never torn: a half-applied one would make the resumed run differ.

    Args:
        silent: Prints nothing, as all ranks but one.

    Returns:
        The context of a list that gets an entry, the signal's number, at each signal.
    """
    requests: list[int] = []

    def request(number, _frame):
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)
        if not silent and len(requests) == 1:
            print("\nstopping after this update, with a checkpoint; Ctrl-C once more stops at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def term_interrupts():
    """Raises Terminated at a TERM signal, as Python raises KeyboardInterrupt at Ctrl-C, so that what is under way is
    put away by the same code."""

    def interrupt(_number, _frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
