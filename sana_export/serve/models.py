"""Models by name: loaded when they are first needed, closed when others need their memory.

Models over one bundle share one runtime; LoRAs are changed when another of them is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import time

from sana_export.adapters import Lora
from sana_export.contract import GRAPH_GROUPS
from sana_export.errors import ArtifactError, SanaExportError, UsageError
from sana_export.hub.bundles.source import find_bundle
from sana_export.hub.client import Hub
from sana_export.manifest import FILE_NAME, Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.memory import AUTO
from sana_export.serve.config import ModelConfig
from sana_export.serve.engine import ModelCard
from sana_export.serve.errors import Refusal

LOG = logging.getLogger(__name__)
#: Opens the runtime of a model, without its LoRAs.
Opener = Callable[[ModelConfig, Path], SanaRuntime]
#: What the file system says of a file: device, inode, size, and the time of the last change.
Stamp = tuple[int, ...]


@dataclass(frozen=True)
class KnownModel:
    """A model whose bundle has been found."""

    config: ModelConfig
    folder: Path
    manifest: Manifest
    #: Of the manifest's file, before it was read.
    manifest_stamp: Stamp | None
    created: int

    @classmethod
    def read(cls, config: ModelConfig, folder: Path) -> KnownModel:
        """Read the manifest in `folder`. Raises what `Manifest.load` raises."""
        stamp = _stamp(folder / FILE_NAME)
        return cls(config, folder, Manifest.load(folder), stamp, int(time()))

    def current(self) -> KnownModel:
        """This model, with the manifest that is in its folder now. One that is missing or damaged changes nothing."""
        stamp = _stamp(self.folder / FILE_NAME)
        if stamp in (None, self.manifest_stamp):
            return self
        try:
            return replace(self, manifest=Manifest.load(self.folder), manifest_stamp=stamp)
        except ArtifactError:  # loading the model says why
            return self

    @property
    def shared(self) -> Hashable:
        """Equal for models that share a runtime."""
        config = self.config
        options = tuple(sorted((name, repr(value)) for name, value in config.backend_options.items()))
        return self.folder, config.backend, config.memory, config.device, config.threads, options

    @property
    def edits(self) -> bool:
        """Whether it can start from an image."""
        return set(GRAPH_GROUPS["img2img"]) <= set(self.manifest.graphs)

    @property
    def bytes(self) -> int:
        """What the loaded model counts in the memory budget: the weights of its graphs, each file once."""
        if self.config.memory_bytes is not None:
            return self.config.memory_bytes
        files = {entry.path: entry.bytes for graph in self.manifest.graphs.values() for entry in graph.files}
        return sum(files.values())

    def stamps(self) -> dict[str, Stamp]:
        """The stamps of the manifest and of the files of the graphs, by path. A file that was deleted has none: it stays mapped."""
        paths = {FILE_NAME, *(entry.path for graph in self.manifest.graphs.values() for entry in graph.files)}
        return {path: stamp for path in paths if (stamp := _stamp(self.folder / path)) is not None}

    def changed_since(self, before: Mapping[str, Stamp]) -> str:
        """A file that exists and is not what it was; "" if there is none."""
        return next((path for path, stamp in self.stamps().items() if before.get(path) != stamp), "")


@dataclass
class _Loaded:
    runtime: SanaRuntime
    bytes: int
    #: Of its files, before they were loaded.
    stamps: dict[str, Stamp]
    loras: tuple[Lora, ...] = ()


class ModelStore:
    """All models of a server. `use`, `discard` and `close` are for the thread that draws."""

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        budget: int | None = None,
        *,
        hub: Hub | None = None,
        opener: Opener | None = None,
    ) -> None:
        """Find the bundles and read their manifests. Nothing is loaded.

        budget: bytes that loaded bundles may take together. None: no limit.

        Raises UsageError for no models, a name that two of them have, or one that is larger than the budget; what `find_bundle`,
        `Manifest.load` and `Lora.weights` raise.
        """
        self._budget, self._open = budget, open_runtime if opener is None else opener
        self._loaded: dict[Hashable, _Loaded] = {}
        self.known: dict[str, KnownModel] = {}
        for config in configs:
            if config.name in self.known:
                raise UsageError("two models have the same name", found=config.name, wanted="a name for each model")
            named = None if config.backend == AUTO else config.backend
            folder = find_bundle(config.bundle, hub=hub or Hub(), backend=named, device=config.device)
            for lora in config.loras:
                LOG.debug("the model %s has the LoRA %s", config.name, lora.weights)
            model = KnownModel.read(config, folder)
            if budget is not None and model.bytes > budget:
                raise UsageError(
                    f"the model {config.name} is larger than the memory budget",
                    found=f"{model.bytes} bytes",
                    wanted=f"at most {budget}",
                    fix=f"--memory-budget {-(-model.bytes // 2**20)}M",
                )
            self.known[config.name] = model
        if not self.known:
            raise UsageError("the server has no models", found="none", wanted="one or more")

    def __getitem__(self, name: str) -> KnownModel:
        """A model, whose manifest is read again if its file has changed. Raises Refusal for an unknown name."""
        if name not in self.known:
            raise Refusal("model_not_found", f"the model {name[:100]!r} does not exist", param="model")
        model = self.known[name] = self.known[name].current()
        return model

    def cards(self) -> tuple[ModelCard, ...]:
        """The models as clients see them."""
        return tuple(
            ModelCard(
                name=name,
                created=model.created,
                edits=model.edits,
                native_size=model.manifest.model.native_size,
                loaded=model.shared in self._loaded,
            )
            for name in self.known
            for model in [self[name]]
        )

    def use(self, name: str) -> SanaRuntime:
        """The runtime of a model, with its LoRAs and no others. Loads it, and closes those that were not used for the longest.

        A model whose files have changed is loaded again, which checks them: ONNX Runtime maps weights, so it would draw with what
        is in them now, and end the process if they are shorter.

        Raises the errors of `SanaRuntime.from_pretrained` and `load_lora`.
        """
        model = self[name]
        loaded = self._loaded.pop(model.shared, None)
        if loaded is not None and (changed := model.changed_since(loaded.stamps)):
            LOG.warning("loading the model %s again, because %s has changed", name, changed)
            _close(loaded)
            loaded = None
        if loaded is None:
            self._make_room(model.bytes)
            LOG.info("loading the model %s from %s", name, model.folder)
            stamps = model.stamps()
            loaded = _Loaded(self._open(model.config, model.folder), model.bytes, stamps)
        self._loaded[model.shared] = loaded  # the last one is the one that was used last
        if loaded.loras != model.config.loras:
            loaded.runtime.unload_lora()
            loaded.loras = ()
            for lora in model.config.loras:
                loaded.runtime.load_lora(lora.path, lora.scales)
                loaded.loras += (lora,)
        return loaded.runtime

    def discard(self, name: str) -> None:
        """Close the runtime of a model after it failed. The next use loads it again."""
        if (loaded := self._loaded.pop(self.known[name].shared, None)) is not None:
            _close(loaded)

    def close(self) -> None:
        """Close all."""
        while self._loaded:
            _close(self._loaded.popitem()[1])

    def _make_room(self, wanted: int) -> None:
        while self._budget is not None and self._loaded and wanted + sum(m.bytes for m in self._loaded.values()) > self._budget:
            oldest = next(iter(self._loaded))
            LOG.info("closing a model to make room: %s", self._loaded[oldest].runtime.bundle)
            _close(self._loaded.pop(oldest))


def open_runtime(config: ModelConfig, folder: Path) -> SanaRuntime:
    """The runtime of a model, without its LoRAs."""
    return SanaRuntime.from_pretrained(
        folder,
        backend=config.backend,
        memory=config.memory,
        device=config.device,
        threads=config.threads,
        backend_options=config.backend_options,
    )


def _stamp(path: Path) -> Stamp | None:
    """None: there is no such file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _close(loaded: _Loaded) -> None:
    try:
        loaded.runtime.close()
    except SanaExportError as error:  # its memory is released all the same
        LOG.warning("closing a model failed: %s", error)
