"""Returns what was read of mapped files to the system while it is still being read.

Linux counts the pages that a process has read of a mapped file as that process's memory until memory is short. A check of an
export reads every weight once, so its memory would grow by the whole file. Such pages are copies of the file: returned, they are
read again if they are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

_MAPS = Path("/proc/self/smaps")
#: Seconds between two returns. A CPU reads few layers in this time.
PERIOD = 0.05


@contextlib.contextmanager
def returning_pages(folder: Path, period: float = PERIOD) -> Iterator[None]:
    """While the block runs, every `period` seconds, return the pages of all files in `folder` and below that are mapped now.

    They must stay mapped until it ends, because something else could take their place, and must not be written to in it. A private
    map that was written to before keeps its pages, which the file does not have. Systems other than Linux keep all pages.
    """
    regions = clean_regions(folder)
    if not regions:
        yield
        return
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(period):
            return_pages(regions)

    thread = threading.Thread(target=repeat, name="returning pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        return_pages(regions)


def return_pages(regions: Iterable[tuple[int, int]]) -> None:
    """Return the pages of maps, each an address and a length. They are read from the files again if they are needed."""
    advise = ctypes.CDLL(None).madvise
    for start, length in regions:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def clean_regions(folder: Path) -> list[tuple[int, int]]:
    """Address and length of each map of a file in `folder` or below, without private maps that were written to.

    Empty on systems other than Linux.
    """
    if not _MAPS.exists():
        return []
    inside, regions = f"{folder.resolve()}/", []
    for head, fields in _maps(_MAPS.read_text("utf-8", errors="surrogateescape")):
        addresses, flags, _offset, _device, _inode, *path = head.split(maxsplit=5)
        # Pages that a private map has written are anonymous memory, in RAM or swapped out. A shared map has none.
        written = flags.endswith("p") and any(
            re.search(rf"^{name}: +[1-9]", fields, re.MULTILINE) for name in ("Anonymous", "Swap")
        )
        if path and path[0].startswith(inside) and not written:
            start, end = (int(address, 16) for address in addresses.split("-"))
            regions.append((start, end - start))
    return regions


def _maps(text: str) -> Iterator[tuple[str, str]]:
    """The first line of each map in /proc/self/smaps, and its other lines."""
    _, *parts = re.split(r"^([0-9a-f]+-[0-9a-f]+ .*)$", text, flags=re.MULTILINE)
    yield from zip(parts[::2], parts[1::2], strict=True)
