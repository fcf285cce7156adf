"""Returns what was read of mapped files to the system while it is still being read.

Linux counts the pages that a process has read of a mapped file as that process's memory until memory is short. A check of an
export reads every weight once, so its memory would grow by the whole file. Such pages are copies of the file: returned, they are
read again if they are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

_MAPS = Path("/proc/self/maps")
#: Seconds between two returns. A CPU reads few layers in this time.
PERIOD = 0.05


@contextlib.contextmanager
def returning_pages(folder: Path) -> Iterator[None]:
    """While the block runs, return the pages of all files in `folder` and below that are mapped when it begins.

    They must stay mapped until it ends: something else could be at their place. What was written to a private map is lost. Systems
    other than Linux keep the pages.
    """
    regions = mapped_regions(folder)
    if not regions:
        yield
        return
    advise, done = ctypes.CDLL(None).madvise, threading.Event()

    def return_pages() -> None:
        for start, length in regions:
            advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)

    def repeat() -> None:
        while not done.wait(PERIOD):
            return_pages()

    thread = threading.Thread(target=repeat, name="returning pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        return_pages()


def mapped_regions(folder: Path) -> list[tuple[int, int]]:
    """Address and length of each map of a file in `folder` or below. Empty on systems other than Linux."""
    if not _MAPS.exists():
        return []
    inside, regions = f"{folder.resolve()}/", []
    for line in _MAPS.read_text("utf-8", errors="surrogateescape").splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith(inside):
            start, end = (int(address, 16) for address in addresses.split("-"))
            regions.append((start, end - start))
    return regions
