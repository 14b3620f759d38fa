"""Calls into Triton's binding: they hold the interpreter, and never return once the server was killed."""

from __future__ import annotations

import contextlib
import faulthandler
import threading
from collections.abc import Iterator

_HUNG_S = 30.0
_ONE_CALL = threading.Lock()  # the process has one timer


@contextlib.contextmanager
def ended_if_it_hangs() -> Iterator[None]:
    """End this process if the block takes longer than 30 s. Waits for other calls of this kind, and for long ones."""
    with _ONE_CALL:
        faulthandler.dump_traceback_later(_HUNG_S, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def long_call() -> Iterator[None]:
    """A call that may take minutes, such as a load: no timer runs meanwhile."""
    with _ONE_CALL:
        yield
