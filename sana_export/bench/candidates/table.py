"""What can be timed: a table of names, and the small interface that each fulfils inside its own process."""

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
from sana_export.runtime.backends import BACKENDS

BASELINE = "eager"
#: In place of names: every row; those that cannot run here are left out with their reason, and are no failure.
ALL = "all"


@dataclass(frozen=True)
class Job:
    """What a worker is told once, before it loads. Paths are strings, so that a job crosses a pipe as JSON.

    `clamp`, `pag_layers`, `precision`: the bundle's options, which the baseline follows. `transformer`, `loras`: the file and the
    adapters, with their scales, that the user laid over the checkpoint.
    """

    backend: str
    bundle: str
    checkpoint: str
    weights_variant: str | None
    precision: str
    clamp: bool
    pag_layers: tuple[int, ...]
    threads: int
    workload: Workload
    transformer: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    #: Index of the GPU; None takes the first.
    device: int | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Job:
        """The job that `dataclasses.asdict` and JSON turned into `document`."""
        workload = document["workload"]
        workload = Workload(**{**workload, "prompts": tuple(workload["prompts"])})
        loras = tuple((path, scale) for path, scale in document.get("loras", ()))
        return cls(**{**document, "pag_layers": tuple(document["pag_layers"]), "workload": workload, "loras": loras})

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Sample:
    """One call's images, all of one size, and the times of its stages without `end_to_end`, which the worker takes."""

    images: Sequence[Image]
    times: StageTimes


class Candidate(Protocol):
    """A loaded pipeline. `description` says what runs and in which dtypes; `precision` is the least of them ("fp32", ...)."""

    description: str
    precision: str

    def generate(self, prompt: str, seed: int) -> Sample:
        """Sample `workload.images_per_prompt` images of one prompt, as the workload says."""
        ...

    def peak_device_bytes(self) -> int | None:
        """The most device memory held so far; None where there is no device or it cannot be told."""
        ...


@dataclass(frozen=True)
class Row:
    """One name. `load`: "module:function" taking a Job and returning a Candidate.

    `prepare`: "module:function" taking a Job, run once in a process of its own before anything is loaded or timed. `work`: whose
    work it does, None where nobody has counted it. `fixed_shapes`: sweeps leave it out. `slow_on_cpu`: why `ALL` leaves it out on
    a CPU.
    """

    load: str
    prepare: str | None = None
    work: str | None = None
    fixed_shapes: bool = False
    slow_on_cpu: str | None = None


ROWS: dict[str, Row] = {
    BASELINE: Row("sana_export.bench.candidates.eager:load", work=REFERENCE),
    "compile": Row(
        "sana_export.bench.candidates.eager:load_compiled",
        work=REFERENCE,
        fixed_shapes=True,
        slow_on_cpu="compiling takes minutes on a CPU: ask for it by name, --backend compile",
    ),
    "trace": Row(
        "sana_export.bench.candidates.trace:load",
        "sana_export.bench.candidates.trace:prepare",
        work=REFERENCE,
        fixed_shapes=True,
    ),
    **{name: Row("sana_export.bench.candidates.runtime:load", work=BUNDLE) for name in BACKENDS},
}


def find_row(name: str) -> Row:
    """The row `name`; a name with a colon is itself a "module:function" that loads. UsageError lists what there is."""
    if ":" in name:
        return Row(name)
    if name not in ROWS:
        near = difflib.get_close_matches(name, ROWS, n=3)
        raise UsageError(
            f"there is no backend {name!r} to time",
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
    """`names` once each in their order, `ALL` as every row, the baseline first; UsageError for an unknown one or none at all."""
    each = [row for name in names for row in (ROWS if name == ALL else [name])]
    unique = sorted(dict.fromkeys(each), key=lambda name: name != BASELINE)
    for name in unique:
        find_row(name)
    if not unique:
        raise UsageError("nothing to time", found="no backend", wanted=", ".join((*ROWS, ALL)), fix=f"--backend {BASELINE}")
    return tuple(unique)
