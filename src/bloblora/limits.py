"""A limit on the time that something of others may take: a regular expression or a template need not end."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 10.0
"""Of one match or one filled template; both take milliseconds."""


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Raise a TimeoutError when a block takes longer.

    In the main thread a signal interrupts Python and `re`. Python gives no signal to other threads, and Windows lacks
    this one: there Python is interrupted, such as a template that loops, and one call into C, such as a match, isn't.
    """
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    try:
        with _alarm() if main else _interruption():
            yield
    except _TooLong:
        raise TimeoutError(f"{what} takes more than {SECONDS:g} s") from None


class _TooLong(BaseException):
    """Not an Exception, which a template's functions may catch."""


@contextmanager
def _alarm() -> Iterator[None]:
    """Raise in the main thread, by a signal."""

    def stop(*_: object) -> None:
        raise _TooLong

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # one that was set before


@contextmanager
def _interruption() -> Iterator[None]:
    """Raise in this thread, from a thread that waits."""
    thread, lock, ended = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not ended:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TooLong))

    timer = threading.Timer(SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            ended = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # one that comes too late
        timer.cancel()
