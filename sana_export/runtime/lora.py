"""LoRAs on a loaded bundle. A change is applied to every graph with a part of the transformer, or to none."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sana_export.adapters import Lora, lora_at
from sana_export.commands import export_command
from sana_export.environment import return_free_memory
from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.formats.arrays import Array, Bytes
from sana_export.formats.onnx_weights import read_tensors
from sana_export.known_files import check_known_files
from sana_export.runtime.backends.base import Backend, Session
from sana_export.runtime.lora_values import Adapter, lora_values, read_adapter, touched
from sana_export.runtime.metadata import lora_document

log = logging.getLogger(__name__)


class LoraStack:
    """The LoRAs in the sessions of one bundle, in the order in which they were loaded. Their effects add up.

    Weights are always computed from the bundle's own bytes, so an unloaded LoRA leaves nothing behind.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend, self._bundle, self._manifest = backend, backend.bundle, backend.manifest
        self._targets = {name: graph.lora_targets for name, graph in self._manifest.graphs.items() if graph.lora_targets}
        self._adapters: tuple[Adapter, ...] = ()
        self._base: dict[str, dict[str, Bytes]] = {}
        #: Grows whenever the weights of a session may have changed.
        self.version = 0

    @property
    def loras(self) -> tuple[Lora, ...]:
        return tuple(adapter.lora for adapter in self._adapters)

    def add(self, lora: Lora, sessions: Mapping[str, Session]) -> dict[str, Any]:
        """Load `lora` into `sessions` (by graph), on top of the other LoRAs. Returns how it is recorded (`lora_document`).

        If it does not fit or a session refuses it, `sessions` keep the weights that they have. Raises UsageError, ArtifactError or
        DependencyError then.
        """
        lora_at(lora.path, lora.scales)
        if not self._targets:
            raise ArtifactError(
                f"{self._bundle} does not say where the transformer's layers are in its graphs",
                found="no lora_targets in its manifest",
                wanted="a bundle of this version",
                fix=self._export_command(),
            )
        if not self._backend.can_refit:
            raise DependencyError(
                f"the backend {self._backend.name} cannot change weights after they are loaded",
                found=f"the LoRA {lora.path}",
                wanted="--backend onnxruntime, or engines that were built with --refittable",
                fix=f"export with the LoRA folded in: {self._export_command((lora,))}",
            )
        adapter = read_adapter(lora, [target for targets in self._targets.values() for target in targets])
        self._check_quantized(lora, adapter)
        recorded = lora_document(lora)  # before anything changes, and of the file as it is now
        adapters = (*self._adapters, adapter)
        for graph in [name for name, targets in self._targets.items() if touched(targets, (adapter,))]:
            self._backend.check_refit(graph)
            if graph not in sessions:  # it will be loaded later: check now that its weights stay in range
                self._values(graph, adapters, (adapter,))
        self._change(adapters, (adapter,), sessions)
        return recorded

    def _check_quantized(self, lora: Lora, adapter: Adapter) -> None:
        """Raise UsageError if `adapter` changes a weight that is quantized. Rounding it again would cost minutes and quality."""
        for graph, targets in self._targets.items():
            held = {weight.name for weight in self._manifest.graphs[graph].quantized} & touched(targets, (adapter,))
            if held:
                layer = next(target.module for target in targets if target.initializer in held and target.module in adapter.folds)
                raise UsageError(
                    f"{self._bundle} is quantized: the LoRA {lora.path} cannot change its weights after the export",
                    found=f"{layer} in {self._manifest.options.scheme(graph)}",
                    wanted="the LoRA folded in before quantization",
                    fix=self._export_command((lora,)),
                )

    def clear(self, sessions: Mapping[str, Session]) -> None:
        """Give `sessions` the bundle's own weights back."""
        self._change((), self._adapters, sessions)

    def refit(self, graph: str, session: Session) -> None:
        """Give a session of `graph` that was just loaded the LoRAs of the others."""
        if values := self._values(graph, self._adapters, self._adapters):
            session.refit(values)

    def _change(self, adapters: tuple[Adapter, ...], moved: Sequence[Adapter], sessions: Mapping[str, Session]) -> None:
        """Replace the present adapters by `adapters`; `moved` are those that are added or removed."""
        done: list[str] = []
        for graph in [name for name in self._targets if name in sessions]:
            try:
                if values := self._values(graph, adapters, moved):
                    self.version += 1
                    sessions[graph].refit(values)
                    done.append(graph)
            except BaseException as error:
                self._take_back(done, moved, sessions, error)
                raise
        self._adapters = adapters
        self.version += bool(moved)  # also if no session is loaded now
        return_free_memory()

    def _take_back(
        self, graphs: Sequence[str], moved: Sequence[Adapter], sessions: Mapping[str, Session], reason: BaseException
    ) -> None:
        """Undo a change of `moved` in `graphs`, after `reason` stopped it in another graph."""
        for graph in graphs:
            try:
                sessions[graph].refit(self._values(graph, self._adapters, moved))
            except Exception as error:
                raise ArtifactError(
                    f"the previous weights of {graph} could not be restored: it now has other LoRAs than the rest of the model",
                    found=f"{error}, after {reason}",
                    wanted="the same LoRAs in every graph",
                    fix=f"load the bundle again: SanaRuntime.from_pretrained({str(self._bundle)!r})",
                ) from error

    def _values(self, graph: str, adapters: Sequence[Adapter], moved: Sequence[Adapter]) -> dict[str, Array]:
        """The weights of `graph` that `moved` changes, with the values that they have under `adapters`."""
        targets = self._targets.get(graph, ())
        names = touched(targets, moved)
        if not names:
            return {}
        fix = f"export with the LoRA folded in: {self._export_command(adapter.lora for adapter in adapters)}"
        return lora_values(self._own(graph), targets, adapters, names, fix=fix)

    def _own(self, graph: str) -> dict[str, Bytes]:
        """The bundle's own weights of `graph`, memory-mapped. The files are checked once."""
        if graph not in self._base:
            fix = self._export_command()
            onnx, *data = check_known_files(self._bundle, self._manifest.graphs[graph].files, fix=fix)
            self._base[graph] = read_tensors(onnx, data, fix=fix)
        return self._base[graph]

    def _export_command(self, loras: Iterable[Lora] = ()) -> str:
        return export_command(self._bundle, self._manifest, loras=loras)
