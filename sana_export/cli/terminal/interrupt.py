"""Ctrl-C and SIGTERM end a command with one line and exit code 130, also while native code holds the interpreter.

Python runs a signal's handler between two bytecodes, so a long call into native code (a compiler, a session's run) delays it, and
code in between may swallow what it raises. A thread that reads the wake-up descriptor sees the signal at once, and ends the
process itself when the main thread has not come back in time. That is safe at any moment: everything that this package writes
gets its name only when it is whole.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130
GRACE_SECONDS = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(on_giving_up: Callable[[], None], grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on `SIGNALS`.

    The process ends with `EXIT_CODE`, after `on_giving_up()`, where the block has not been left `grace_seconds` later, or on a
    second signal. Outside the main thread this does nothing: signals are the caller's there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = {number: signal.signal(number, _raise) for number in SIGNALS}
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, on_giving_up, grace_seconds), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        watch.join()
        reader.close()


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(reader: socket.socket, on_giving_up: Callable[[], None], grace_seconds: float) -> None:
    while received := reader.recv(1):
        if received[0] in SIGNALS:
            break
    else:
        return
    reader.settimeout(grace_seconds)
    try:
        if not reader.recv(1):
            return
    except TimeoutError:
        pass
    try:
        on_giving_up()
    finally:
        os._exit(EXIT_CODE)
