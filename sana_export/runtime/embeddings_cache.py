"""Outputs of the text encoder that are kept for the next request with the same prompt.

The text encoder reads each prompt alone (`PromptEncoder`), so an output depends on its tokens and nothing else: an image is the
same bits with the cache and without. LoRAs do not change the text encoder. The outputs stay where the backend computed them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

#: Prompts of 50 tokens of Sana's text encoder take 0.5 MB each.
PROMPT_CACHE_BYTES = 32 << 20
#: More than the memory of any machine.
MOST_CACHE_BYTES = 1 << 50


@dataclass(frozen=True)
class CacheStatistics:
    """What a cache has done and holds."""

    #: Prompts that were found.
    hits: int
    #: Prompts that had to be encoded.
    misses: int
    #: Prompts that it holds.
    entries: int
    #: Bytes that they take.
    bytes: int


class EmbeddingsCache:
    """The most recently used outputs, at most `most_bytes` together. 0 keeps none.

    It is not locked: the runtime holds its lock while it uses it.
    """

    def __init__(self, most_bytes: int = 0) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._hits = self._misses = self._bytes = 0

    @property
    def statistics(self) -> CacheStatistics:
        """The counts since the cache was made, and what it holds now."""
        return CacheStatistics(self._hits, self._misses, len(self._kept), self._bytes)

    def __contains__(self, key: Hashable) -> bool:
        """Whether `get` would find it. Counts nothing."""
        return key in self._kept

    def get(self, key: Hashable) -> Any | None:
        """The output for `key`, which is now the most recently used one. None if it is not here."""
        if key not in self._kept:
            self._misses += 1
            return None
        self._hits += 1
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, output: Any, count: int) -> None:
        """Keep an output of `count` bytes, and drop the least recently used ones that no longer fit."""
        if count > self.most_bytes:
            return
        self._drop(key)
        self._kept[key] = output, count
        self._bytes += count
        while self._bytes > self.most_bytes:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self._bytes = 0

    def _drop(self, key: Hashable) -> None:
        _, count = self._kept.pop(key, (None, 0))
        self._bytes -= count
