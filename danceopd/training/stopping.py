"""Ends a run after the update at hand when a signal asks for it."""

import contextlib
import signal
import sys
import threading


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
