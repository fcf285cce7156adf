"""Ctrl-C and SIGTERM end a command with one line and exit code 130, even while native code is running.

Python runs a signal handler between two bytecodes. A long call into native code (a compiler, an inference session) delays it, and
library code may swallow the exception that it raises. Therefore a thread reads the wake-up descriptor, sees the signal at once, and
ends the process if the main thread does not return in time. Ending it is always safe, because this package renames a file to its
final name only after the file is complete.
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
#: How long the main thread has after a signal.
GRACE_SECONDS = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(on_giving_up: Callable[[], None]) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on `SIGNALS`.

    If the block is still running `GRACE_SECONDS` later, or on a second signal, call `on_giving_up()` and end the process with
    `EXIT_CODE`. Outside the main thread this does nothing, because Python delivers signals to the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous_handlers = {number: signal.signal(number, _raise) for number in SIGNALS}
    previous_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, on_giving_up), daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_descriptor)
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        writer.close()
        watch.join()
        reader.close()


def _raise(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(reader: socket.socket, on_giving_up: Callable[[], None]) -> None:
    while received := reader.recv(1):
        if received[0] in SIGNALS:
            break
    else:
        return
    reader.settimeout(GRACE_SECONDS)
    try:
        if not reader.recv(1):
            return
    except TimeoutError:
        pass
    try:
        on_giving_up()
    finally:
        os._exit(EXIT_CODE)
