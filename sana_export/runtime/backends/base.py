"""What a backend is: it loads the graphs of one bundle as sessions, and a session runs one graph.

To add a backend, subclass `Backend` and `Session` and pass a function of `(bundle, manifest)` that returns the backend to
`SanaRuntime.from_pretrained(..., backend=...)`, or give it a name in `backends.BACKENDS`. The methods with a body here suit a
backend whose sessions finish their work before they return. A GPU backend that only enqueues work subclasses `CapturingBackend`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from sana_export.errors import UsageError
from sana_export.formats.arrays import Array
from sana_export.formats.dtypes import DTYPES
from sana_export.manifest import Manifest
from sana_export.numeric import shown
from sana_export.runtime.memory import AUTO, MEMORY_MODES
from sana_export.runtime.prompt import PromptEmbeddings
from sana_export.runtime.unpicklable import OfThisProcess

#: A tensor where the backend computes: opaque, made by `Backend.to_device` or by a session, readable with `Backend.to_host`.
DeviceTensor = Any
#: Enqueues captured work again.
Replay = Callable[[], None]


def check_options(name: str, value: Any) -> None:
    """Raise UsageError, which calls `value` `name`, unless it is a dict whose keys are texts."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{name} are not named options", found=shown(value), wanted='a dict such as {"name": value}')


@dataclass(frozen=True)
class BackendSettings:
    """What the caller says about the machine."""

    #: Index of the GPU; None takes the first one, and lets ONNX Runtime and torch run on the CPU if there is none.
    device: int | None = None
    #: Threads for work on the CPU; None leaves the number to the backend's library.
    threads: int | None = None
    #: Options of the backend's own library (docs/python.md).
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UsageError unless the options have names."""
        check_options("backend_options", self.options)

    def reject_options(self, backend: str) -> None:
        """Raise UsageError if there are options, for a backend that takes none."""
        if self.options:
            raise UsageError(
                f"the backend {backend} takes no backend_options",
                found=", ".join(map(str, self.options)),
                wanted="no backend_options, or a backend that takes them: every one but torch and torch-compile",
            )


DEFAULT_SETTINGS = BackendSettings()


class Session(OfThisProcess, ABC):
    """One loaded graph."""

    @abstractmethod
    def run(self, feeds: Mapping[str, DeviceTensor | Array]) -> dict[str, DeviceTensor]:
        """Run the graph on all its inputs by name (contract.py) and return all its outputs, left on the device.

        An input is an array of the contract's dtype or a device tensor of this backend, including another session's output. The
        outputs are computed when `run` returns, except in an `EnqueuedSession`. Raises DependencyError if memory runs out.
        """

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Replace the graph's initializers of these names by `weights`; all others keep their values.

        Arrays have the shape and dtype of the stored initializer (bfloat16 as its bits in uint16) and may be read-only maps. The
        next `run` uses them. Raises ArtifactError if the loaded form of the graph cannot take them and DependencyError if memory
        runs out; the session then keeps its old weights. Not called if `Backend.can_refit` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot change weights")


class EnqueuedSession(Session):
    """A session whose `run` returns before the work is done and can write its outputs to given tensors."""

    @abstractmethod
    def run(
        self, feeds: Mapping[str, DeviceTensor | Array], outputs: Mapping[str, DeviceTensor] | None = None
    ) -> dict[str, DeviceTensor]:
        """As `Session.run`. Outputs named in `outputs` are written there; if all are, nothing is allocated."""

    @property
    @abstractmethod
    def capturable(self) -> bool:
        """Whether the work of the last run can be captured."""

    def reserve(self, axes: Mapping[str, int]) -> None:
        """Reserve the memory that a run on inputs with these `axes` (contract.DYNAMIC_AXES) needs.

        Memory that a session reserves later may move what captured work uses, which then has to be captured again.
        """
        return None

    def separate(self) -> EnqueuedSession:
        """A session of the same graph and weights whose captured work stays valid whatever other sessions run."""
        return self


class Backend(OfThisProcess, ABC):
    """Loads graphs of one bundle."""

    #: The backend's name, as in `backends.BACKENDS`.
    name: str
    #: "cpu" or "cuda".
    device: str
    #: The index of the GPU.
    index: int = 0
    bundle: Path
    manifest: Manifest
    #: The kept text tokens are padded to a multiple of this, so that shapes repeat from prompt to prompt.
    text_multiple: int = 1
    #: Whether weights can be changed after a graph is loaded (`Session.refit`).
    can_refit: bool = True

    @abstractmethod
    def load(self, graph: str) -> Session:
        """Check the graph's files against the manifest and load it. Raises ArtifactError, or DependencyError out of memory."""

    @abstractmethod
    def to_device(self, array: Array) -> DeviceTensor:
        """A tensor with the values of `array`, to feed more than once. It may share the array's memory."""

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        """A new tensor of zeros; `dtype` as the contract names it."""
        return self.to_device(np.zeros(shape, DTYPES[dtype].numpy))

    @abstractmethod
    def to_host(self, value: DeviceTensor | Array) -> Array:
        """The values of a float32 or integer tensor. The result may share the tensor's memory: do not write to it."""

    def gather(self, embeddings: PromptEmbeddings) -> DeviceTensor | Array:
        """prompt_embeds float32 [U, B, L, C] from the rows of the text encoder's outputs."""
        return embeddings.gather(self.to_host)

    def record_event(self) -> Any:
        """A point in the order of the work, for `seconds`."""
        return perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two events. Waits for the work before `end`."""
        return float(end - start)

    def choose_memory_mode(self, mode: str) -> str:
        """The memory mode (`MEMORY_MODES`) to run in if the caller asks for `mode`; never "auto".

        Raises UsageError if the backend has no such mode and DependencyError if the GPU is too small for it.
        """
        if mode == "streaming":
            raise UsageError(
                f"the backend {self.name} cannot stream weights",
                found=f"memory {mode!r}",
                wanted=", ".join(name for name in MEMORY_MODES if name != mode),
                fix="--memory staged",
            )
        return "resident" if mode == AUTO else mode

    def check_supported(self, graphs: Iterable[str], axes: Mapping[str, int]) -> None:
        """Raise UsageError if `graphs` cannot serve a request with these `axes` (contract.DYNAMIC_AXES)."""
        return None

    def check_refit(self, graph: str) -> None:
        """Raise ArtifactError if the sessions of `graph` cannot be refitted."""
        return None

    def ranges(self, graph: str) -> Mapping[str, tuple[int, int, int]] | None:
        """min, typical and max of the bounded axes of `graph`; None if the backend has nothing to run it with."""
        return {}

    def wait(self) -> None:
        """Return when all work is done, so that its tensors may be freed."""
        return None

    def release_memory(self) -> None:
        """Give memory that no session and no tensor holds back, for whatever runs next. Work captured before cannot be replayed."""
        return None


class CapturingBackend(Backend):
    """A backend of `EnqueuedSession`s whose work can be captured and replayed. Work is done in the order of the calls."""

    @abstractmethod
    def load(self, graph: str) -> EnqueuedSession: ...

    @abstractmethod
    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        """A new tensor on the device; `dtype` as the contract names it."""

    @abstractmethod
    def table(self, rows: int, shape: Sequence[int], dtype: str) -> Sequence[DeviceTensor]:
        """`rows` tensors of `shape` in one block of memory, each at an address that a session can read."""

    @abstractmethod
    def leading(self, value: DeviceTensor, count: int) -> DeviceTensor:
        """The first `count` rows of `value`, in its memory."""

    @abstractmethod
    def write(self, target: DeviceTensor, value: DeviceTensor | Array) -> None:
        """Copy `value` into `target`, which has its shape and dtype."""

    @abstractmethod
    def write_table(self, target: Sequence[DeviceTensor], rows: Array) -> None:
        """Copy the rows of `rows` into a `table`, in one transfer."""

    @abstractmethod
    def copy(self, value: DeviceTensor) -> DeviceTensor:
        """A new tensor with the values of `value`."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Replay:
        """What `work` enqueues, as one graph; calling the result enqueues all of it again. Capturing does not run the work."""

    @property
    @abstractmethod
    def generation(self) -> int:
        """Changes when memory that captured work uses has moved. Work captured before must not be replayed then."""


#: Makes a backend that is configured already, for `SanaRuntime.from_pretrained(backend=...)`.
Loader = Callable[[Path, Manifest], Backend]
#: Makes a backend of `backends.BACKENDS`.
BackendFactory = Callable[[Path, Manifest, BackendSettings], Backend]
