"""What calibration measured of a graph's layers: a .safetensors file, of which one layer at a time is in memory.

Layers that read the same tensor share one entry. For an entry i the file has `<i>.maximum`, the largest magnitude of each channel
[in], and `<i>.rows`, a random sample [R, in] of everything that was read, in float32. The metadata says which layer has which.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from sana_export import __version__
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.commands import model_words
from sana_export.errors import ArtifactError, UsageError
from sana_export.files import hash_file
from sana_export.formats.arrays import Float32
from sana_export.formats.safetensors_file import TensorFile
from sana_export.json_records import record_from_json
from sana_export.manifest import Options
from sana_export.progress import OnProgress
from sana_export.quantization.layers import part_of

#: The key of the file's metadata.
METADATA = "sana_export.calibration"
#: The file's name in the folder of an unfinished export.
MEASURED = "calibration.safetensors"


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What was seen of the input of some layers."""

    #: Its number in the file.
    index: int
    #: The largest magnitude of each channel, [in].
    maximum: Float32
    #: Some of its rows [R, in].
    rows: Float32


@dataclass(frozen=True)
class CalibrationRecord:
    """Where the numbers come from."""

    #: Hash of the checkpoint.
    checkpoint: str
    #: The precision and the clamp of the graphs that were run.
    precision: str
    clamp: bool
    #: The observed graphs.
    parts: tuple[str, ...]
    #: What was drawn.
    prompts: tuple[str, ...]
    #: Sampling steps, and the images' height and width in pixels. 0: only prompts were encoded.
    steps: int
    size: int
    #: The most rows of each input.
    rows: int

    @property
    def key(self) -> str:
        """Hash of everything that decides the numbers."""
        return hashlib.sha256(json.dumps([__version__, asdict(self)]).encode()).hexdigest()


class CalibrationSource(Protocol):
    """A calibration for an export, measured when it is needed."""

    def key(self, checkpoint: SanaCheckpoint, options: Options, parts: Sequence[str]) -> str:
        """Hash of everything that decides its numbers. Raises UsageError if it does not fit the export."""
        ...

    def open(
        self, checkpoint: SanaCheckpoint, options: Options, parts: Sequence[str], folder: Path, on_progress: OnProgress
    ) -> CalibrationFile:
        """The numbers. They are measured into `folder` unless they are there, or elsewhere, already."""
        ...


class CalibrationFile:
    """The calibration in the file `path`. Raises ArtifactError if it is something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = TensorFile(path)
        try:
            stated = json.loads(self._file.metadata[METADATA])
            self.record = record_from_json(CalibrationRecord, stated["record"])
            #: Graph -> weight -> the number of its layer's input.
            self.layers: dict[str, dict[str, int]] = {graph: dict(numbers) for graph, numbers in stated["layers"].items()}
            for index in {index for numbers in self.layers.values() for index in numbers.values()}:
                if not {f"{index}.maximum", f"{index}.rows"} <= self._file.keys():
                    raise KeyError(f"{index}.rows")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is not a calibration", found=error, wanted="a file of `sana-export calibrate`") from error

    def key(self, checkpoint: SanaCheckpoint, options: Options, parts: Sequence[str]) -> str:
        """Hash of the file. Raises UsageError unless it is of this checkpoint, with these options, and saw the graphs `parts`."""
        command = ["sana-export", "calibrate", *model_words(checkpoint.record()), "-o", str(self.path)]
        command += ["--dtype", options.precision, "--clamp" if options.clamp else "--no-clamp"]
        wanted = {"checkpoint": checkpoint.sha256, "precision": options.precision, "clamp": options.clamp}
        for name, value in wanted.items():
            if (found := getattr(self.record, name)) != value:
                raise UsageError(
                    f"{self.path} was measured with another {name}",
                    found=str(found)[:16],
                    wanted=str(value)[:16],
                    fix=f"omit --calibration, or measure it again: {shlex.join(command)}",
                )
        if missing := [part for part in parts if part not in self.record.parts]:
            raise UsageError(
                f"{self.path} does not cover the {missing[0]}",
                found=", ".join(self.record.parts),
                wanted=", ".join(parts),
                fix=f"omit --calibration, or measure it again: {shlex.join(command)}",
            )
        return hash_file(self.path)

    def open(
        self, checkpoint: SanaCheckpoint, options: Options, parts: Sequence[str], folder: Path, on_progress: OnProgress
    ) -> CalibrationFile:
        return self

    def index(self, graph: str, weight: str) -> int | None:
        """The number of the input of the layer with `weight`. None if nothing was seen of it."""
        part = part_of(graph)
        inner = weight if part == graph else f"{graph.removeprefix(f'{part}_')}.{weight}"  # as part of the whole graph
        return self.layers.get(part, {}).get(inner)

    def inputs(self, graph: str, weight: str) -> LayerInputs | None:
        """What was seen of the input of the layer with `weight`. None if nothing was."""
        if (index := self.index(graph, weight)) is None:
            return None
        return LayerInputs(index, self._file[f"{index}.maximum"].read(), self._file[f"{index}.rows"].read())
