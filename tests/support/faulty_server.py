"""`sana-export` whose slow clients have little time, with a backend that fails when a file says so.

    python -m tests.support.faulty_server serve BUNDLE ...

The file is named by $SANA_EXPORT_TEST_FAULT. It is read before each call of a graph and has a word of `FAULTS`, or nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sana_export.cli.main import main
from sana_export.manifest import Manifest
from sana_export.runtime.backends import BACKENDS
from sana_export.runtime.backends.base import Backend, BackendSettings, Session
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from sana_export.runtime.backends.onnxruntime_provider import cuda_failures
from sana_export.serve import drawing, run
from sana_export.serve.config import ServeConfig
from tests.support.serve_clients import VARIABLE

#: Seconds that slow clients have, for each of the server's limits.
SECONDS = 1.0
#: What ONNX Runtime's CUDA provider raises when its arena cannot grow.
NO_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
    "bfc_arena.cc:358 AllocateRawInternal Failed to allocate memory for requested buffer of size 4294967296"
)


def _no_memory(graph: str, file: Path) -> None:
    with cuda_failures(f"running {graph}", "cuda"):
        raise RuntimeError(NO_MEMORY)


def _hang(graph: str, file: Path) -> None:
    while file.read_text() == "hang":
        time.sleep(0.01)


def _slow(graph: str, file: Path) -> None:
    time.sleep(0.5)


def _unexpected(graph: str, file: Path) -> None:
    raise RuntimeError(f"cannot read {file}")


#: What a call of a graph does before it runs: memory runs out, it does not return, it takes half a second, a fault of ours.
FAULTS: Mapping[str, Callable[[str, Path], None]] = {"memory": _no_memory, "hang": _hang, "slow": _slow, "unexpected": _unexpected}


class FaultySession(Session):
    """A session that asks the file first."""

    def __init__(self, session: Session, graph: str, file: Path) -> None:
        self._session, self._graph, self._file = session, graph, file

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if word := self._file.read_text().strip():
            FAULTS[word](self._graph, self._file)
        return self._session.run(feeds)


class FaultyBackend(OnnxRuntimeBackend):
    """ONNX Runtime with `FaultySession`s."""

    def load(self, graph: str) -> Session:
        return FaultySession(super().load(graph), graph, Path(os.environ[VARIABLE]))


def _load(bundle: Path, manifest: Manifest, settings: BackendSettings) -> Backend:
    return FaultyBackend(bundle, manifest, settings)


def _serve(config: ServeConfig, *arguments: Any, **named: Any) -> None:
    limits = replace(config.limits, head_seconds=SECONDS, body_seconds=SECONDS, read_seconds=SECONDS)
    SERVE(replace(config, limits=limits), *arguments, **named)


SERVE = run.serve

if __name__ == "__main__":
    run.serve = _serve
    drawing.STEP_SECONDS = SECONDS
    BACKENDS["onnxruntime"] = _load
    sys.exit(main())
