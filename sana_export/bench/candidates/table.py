"""What can be timed: a table of backends, and the interface that each implements in its own process."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL.Image import Image

from sana_export.bench.stages import StageTimes
from sana_export.bench.work.count import BUNDLE, REFERENCE
from sana_export.bench.workload import Workload
from sana_export.errors import UsageError
from sana_export.lora_scales import LayerScales
from sana_export.runtime.backends import BACKENDS

BASELINE = "eager"
#: A name that means every row. Rows that cannot run on this machine are then skipped with the reason and do not fail the run.
ALL = "all"


@dataclass(frozen=True)
class Job:
    """What a worker loads and runs. Paths are strings, because a job is sent to the worker as JSON."""

    #: Name of the backend in `ROWS`, or "module:function".
    backend: str
    #: Folder of the bundle.
    bundle: str
    #: Folder of the checkpoint that the bundle was exported from.
    checkpoint: str
    #: The checkpoint's weights variant ("fp16"), or None.
    weights_variant: str | None
    #: Precision of the bundle.
    precision: str
    #: Whether the bundle clamps. The baseline does the same.
    clamp: bool
    #: The bundle's PAG layers, which the baseline uses too.
    pag_layers: tuple[int, ...]
    #: Number of CPU threads.
    threads: int
    #: What to sample.
    workload: Workload
    #: A transformer file that replaces the checkpoint's, or None.
    transformer: str | None = None
    #: The folder of an autoencoder that replaces the checkpoint's, or None.
    vae: str | None = None
    #: Path, scale and layer scales of each LoRA that is added to the checkpoint.
    loras: tuple[tuple[str, float, LayerScales], ...] = ()
    #: Index of the GPU. None means the first one. Ignored on a CPU.
    device: int | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Job:
        """The job that `as_json` turned into `document`."""
        workload = document["workload"]
        workload = Workload(**{**workload, "prompts": tuple(workload["prompts"]), "sweep": tuple(workload["sweep"])})
        loras = tuple((path, scale, tuple(map(tuple, layers))) for path, scale, layers in document.get("loras", ()))
        return cls(**{**document, "pag_layers": tuple(document["pag_layers"]), "workload": workload, "loras": loras})

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Generated:
    """The result of one call."""

    #: The images, all of one size.
    images: Sequence[Image]
    #: Times of the stages in ms. The worker adds `end_to_end`.
    times: StageTimes


class Candidate(Protocol):
    """A loaded pipeline."""

    #: What runs, on which device and in which dtypes.
    description: str
    #: The lowest of its precisions: "fp32", "fp16" or "bf16".
    precision: str

    def generate(self, prompt: str, seed: int) -> Generated:
        """Generate `workload.images_per_prompt` images of one prompt with the workload's settings."""
        ...

    def peak_device_bytes(self) -> int | None:
        """Peak device memory so far. None if there is no device or the memory is not known."""
        ...


@dataclass(frozen=True)
class Row:
    """One backend that can be timed."""

    #: "module:function" of a function that takes a Job and returns a Candidate.
    load: str
    #: "module:function" of a function that takes a Job. It runs once in its own process before anything is loaded or timed.
    prepare: str | None = None
    #: Whose work it does: `BUNDLE`, `REFERENCE`, or None if nobody has counted it.
    work: str | None = None
    #: True if it runs only the workload's own shapes. Sweeps skip it.
    fixed_shapes: bool = False
    #: Why `ALL` skips it on a CPU, or None.
    slow_on_cpu: str | None = None


ROWS: dict[str, Row] = {
    BASELINE: Row("sana_export.bench.candidates.eager:load", work=REFERENCE),
    "compile": Row(
        "sana_export.bench.candidates.eager:load_compiled",
        work=REFERENCE,
        fixed_shapes=True,
        slow_on_cpu="compiling takes minutes on a CPU; to time it, name it: --backend compile",
    ),
    "trace": Row(
        "sana_export.bench.candidates.trace:load",
        "sana_export.bench.candidates.trace:prepare",
        work=REFERENCE,
        fixed_shapes=True,
    ),
    "openvino": Row("sana_export.bench.candidates.openvino:load", work=BUNDLE),
    **{name: Row("sana_export.bench.candidates.runtime:load", work=BUNDLE) for name in BACKENDS},
}


def find_row(name: str) -> Row:
    """The row of `name`. A name with a colon is the "module:function" that loads. Raises UsageError for an unknown name."""
    if ":" in name:
        return Row(name)
    if name not in ROWS:
        near = difflib.get_close_matches(name, ROWS, n=3)
        raise UsageError(
            f"unknown backend {name!r}",
            found=name,
            wanted=", ".join(near or (*ROWS, ALL)),
            fix=f"--backend {near[0] if near else 'onnxruntime'}",
        )
    return ROWS[name]


def resolve(target: str) -> Callable[[Job], Any]:
    """The function that "module:function" names."""
    module, _, function = target.partition(":")
    found: Callable[[Job], Any] = getattr(importlib.import_module(module), function)
    return found


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """`names` without duplicates, the baseline first, with every row in place of `ALL`.

    Raises UsageError for an unknown name, or if there is none.
    """
    each = [row for name in names for row in (ROWS if name == ALL else [name])]
    unique = sorted(dict.fromkeys(each), key=lambda name: name != BASELINE)
    for name in unique:
        find_row(name)
    if not unique:
        raise UsageError("no backend to time", found="no name", wanted=", ".join((*ROWS, ALL)), fix=f"--backend {BASELINE}")
    return tuple(unique)
