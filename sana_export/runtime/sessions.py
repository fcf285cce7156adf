"""The sessions of one runtime. They are loaded on first use; in a staged runtime, only those of one stage are loaded at a time."""

from __future__ import annotations

from collections.abc import Iterable

from sana_export.environment import return_free_memory
from sana_export.runtime.backends.base import Backend, Session
from sana_export.runtime.lora import LoraStack


class Sessions(dict[str, Session]):
    """Sessions by graph. Reading one loads it if it is not loaded, with the LoRAs of `loras`."""

    def __init__(self, backend: Backend, loras: LoraStack, *, staged: bool) -> None:
        """`staged`: `require` drops the sessions of all other graphs."""
        super().__init__()
        self.staged = staged
        self._backend, self._loras = backend, loras

    def __missing__(self, graph: str) -> Session:
        session = self._backend.load(graph)
        self._loras.refit(graph, session)
        self[graph] = session
        return session

    def require(self, graphs: Iterable[str]) -> None:
        """Load the sessions of `graphs`. If the runtime is staged, drop all others first."""
        graphs = tuple(graphs)
        if self.staged and (others := self.keys() - set(graphs)):
            self._backend.wait()
            for graph in others:
                del self[graph]
            self._backend.release_memory()
            return_free_memory()
        for graph in graphs:
            self[graph]  # reading loads
