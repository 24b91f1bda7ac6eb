"""A limit on the time that something of others may take: a regular expression or a template need not end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10.0
"""Of one match or one filled template; both take milliseconds."""


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Raise a TimeoutError when a block of Python, or of `re`, takes longer.

    A signal interrupts it, which Python gives to the main thread alone and Windows lacks: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"{what} takes more than {SECONDS:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # one that was set before
