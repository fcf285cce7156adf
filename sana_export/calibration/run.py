"""Draws images with a checkpoint's graphs in torch and writes what their layers read to a file."""

from __future__ import annotations

import contextlib
import json
import tempfile
import weakref
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from sana_export.calibration.observer import GraphInputs, ObservedProducts
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.contract import GRAPH_GROUPS
from sana_export.errors import ArtifactError, UsageError
from sana_export.export.bundle import model_info
from sana_export.export.example_inputs import graph_spec
from sana_export.export.half import WideProducts
from sana_export.export.options import choose_options
from sana_export.export.quantize.plan import quantizable
from sana_export.export.quantize.statistics import MEASURED, METADATA, CalibrationFile, CalibrationRecord
from sana_export.export.text_files import EMBEDDINGS, INSTRUCTION, TOKENIZER, write_text_files
from sana_export.files import FileEntry, disk_errors, file_entry, partial_path
from sana_export.manifest import GraphEntry, Manifest, Options
from sana_export.numeric import MAX_SIDE, integer
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.quantization.layers import CALIBRATED_PARTS
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.torch import TorchBackend, TorchSession
from sana_export.runtime.prompt import PromptEncoder
from sana_export.synth.corpus import ENGLISH
from sana_export.user_paths import user_path

#: Rows of each layer's input that are kept. More rows than that hardly change the result (docs/quantization.md).
ROWS = 1024
MOST_ROWS = 1 << 16
#: What is drawn if the user names no prompts. What cross-attention reads depends on the prompt, so it takes some.
PROMPTS = tuple(ENGLISH.strip().splitlines()[:32])


class ObservingBackend(TorchBackend):
    """The graphs of a checkpoint on the CPU, with observed inputs."""

    def __init__(self, folder: Path, manifest: Manifest, checkpoint: SanaCheckpoint, parts: Collection[str], rows: int) -> None:
        super().__init__(folder, manifest, checkpoint, compiled=False)
        #: What each of `parts` has read.
        self.seen = {part: GraphInputs(rows) for part in parts}

    def load(self, graph: str) -> TorchSession:
        session = super().load(graph)
        reference = weakref.ref(session.module)
        mode: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if graph in self.seen:
            mode = ObservedProducts(quantizable(session.module, graph), self.seen[graph])

        def observed(*args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
            module = reference()  # the module holds this function, and would hold itself
            assert module is not None
            with mode, WideProducts():
                return type(module).forward(module, *args, **kwargs)

        session.module.forward = observed
        return session


@dataclass(frozen=True)
class Calibration:
    """What to draw for a calibration. An export that needs one measures it (`export_bundle(calibration=Calibration())`)."""

    #: The prompts. If only the text encoder is observed, they are only encoded.
    prompts: Sequence[str] = PROMPTS
    #: Sampling steps. None: the checkpoint's own.
    steps: int | None = None
    #: The images' height and width in pixels. None: the checkpoint's own.
    size: int | None = None
    #: The most rows of each layer's input to keep.
    rows: int = ROWS

    def key(self, checkpoint: SanaCheckpoint, options: Options, parts: Sequence[str]) -> str:
        return self.record(checkpoint, options, parts).key

    def open(
        self, checkpoint: SanaCheckpoint, options: Options, parts: Sequence[str], folder: Path, on_progress: OnProgress
    ) -> CalibrationFile:
        path, record = folder / MEASURED, self.record(checkpoint, options, parts)
        if not path.exists():
            _measure(checkpoint, options, record, path, on_progress)
        return CalibrationFile(path)

    def record(self, checkpoint: SanaCheckpoint, options: Options, parts: Sequence[str]) -> CalibrationRecord:
        """What a measurement of `parts` is made of. Raises UsageError for a value that does not fit."""
        if not parts or (unknown := set(parts) - set(CALIBRATED_PARTS)):
            found = min(unknown) if parts else "no parts"
            raise UsageError("a graph that calibration does not run", found=found, wanted=f"some of {', '.join(CALIBRATED_PARTS)}")
        parts = [part for part in CALIBRATED_PARTS if part in parts]
        rows = integer("rows", self.rows, 1, MOST_ROWS)
        prompts = () if isinstance(self.prompts, str) else tuple(self.prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise UsageError("there is nothing to calibrate with", found=repr(self.prompts)[:80], wanted="a list of prompts")
        own = model_info(checkpoint, "")
        steps = own.default_steps if self.steps is None else integer("steps", self.steps, 1, 1000)
        size = own.native_size if self.size is None else integer("size", self.size, own.vae_scale_factor, MAX_SIDE)
        if set(parts) <= {"text_encoder"}:
            steps = size = 0
        return CalibrationRecord(
            checkpoint.sha256,
            options.precision,
            options.clamp,
            tuple(parts),
            prompts,
            steps,
            size - size % own.vae_scale_factor,
            rows,
        )


def calibrate(
    checkpoint: SanaCheckpoint,
    output: Path,
    calibration: Calibration = Calibration(),
    *,
    parts: Sequence[str] = CALIBRATED_PARTS,
    precision: str = "fp16",
    clamp: bool | None = None,
    on_progress: OnProgress = ignore_progress,
) -> CalibrationFile:
    """Draw with the checkpoint's graphs, in torch on the CPU, and write what the layers of `parts` read to the file `output`.

    `precision`, `clamp`: as of the exports that will use the file. Equal arguments give equal files. Raises UsageError for an
    argument that does not fit, DependencyError if the disk is full.
    """
    place = user_path(output, "the calibration file")
    if place.is_dir():
        raise UsageError(f"{place} is a folder", found="a folder", wanted="the name of a file", fix=f"-o {place / MEASURED}")
    options = choose_options(checkpoint, precision, (), clamp)
    record = calibration.record(checkpoint, options, parts)
    _measure(checkpoint, options, record, place, on_progress)
    return CalibrationFile(place)


def _measure(checkpoint: SanaCheckpoint, options: Options, record: CalibrationRecord, path: Path, on_progress: OnProgress) -> None:
    """Measure what `record` says and write it to `path`."""
    plain = replace(options, quantize={}, pag_layers=())
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), tempfile.TemporaryDirectory(prefix="tmp-", dir=path.parent) as folder:
        manifest = _manifest(checkpoint, plain, Path(folder))
        backend = ObservingBackend(Path(folder), manifest, checkpoint, record.parts, record.rows)
        with SanaRuntime(backend, PromptEncoder.load(Path(folder), manifest), "staged") as runtime:
            _draw(runtime, record, on_progress)
        _write(path, record, backend.seen)


def _manifest(checkpoint: SanaCheckpoint, options: Options, folder: Path) -> Manifest:
    """What a runtime with graphs in torch needs: the text files, written into `folder`, and the graphs without ONNX files."""
    instruction, none = write_text_files(checkpoint, folder), FileEntry("", "", 0)
    return Manifest(
        checkpoint=checkpoint.record(),
        options=options,
        model=model_info(checkpoint, instruction),
        graphs={name: GraphEntry(graph_spec(name, checkpoint, options), none, (), 0, 0) for name in GRAPH_GROUPS["default"]},
        files=tuple(file_entry(folder, folder / name) for name in (TOKENIZER, INSTRUCTION, EMBEDDINGS)),
        export_key="",
    )


def _draw(runtime: SanaRuntime, record: CalibrationRecord, on_progress: OnProgress) -> None:
    """Encode all prompts, then draw each. So the text encoder, the largest graph, is loaded once."""
    count, total = len(record.prompts), len(record.prompts) * (2 if record.steps else 1)
    encoded: list[dict[str, Any]] = []
    for index, text in enumerate(record.prompts):
        on_progress(Progress("encoding prompts", index, total))
        encoded.append(dict(runtime.encode_prompt(text).arrays))
    for index, embeddings in enumerate(encoded if record.steps else ()):
        on_progress(Progress("calibrating", count + index, total))
        runtime(
            **embeddings,
            num_inference_steps=record.steps,
            height=record.size,
            width=record.size,
            seed=index,
            use_resolution_binning=False,
            output_type="latent",
        )
    on_progress(Progress("calibrating", total, total))


def _numbered(seen: dict[str, GraphInputs]) -> dict[str, dict[str, int]]:
    """Graph -> weight -> number of its sample."""
    owners = [(graph, owner) for graph, inputs in seen.items() for owner in inputs.samples]
    numbers = {place: index for index, place in enumerate(owners)}
    return {graph: {name: numbers[graph, owner] for name, owner in inputs.owners.items()} for graph, inputs in seen.items()}


def _write(path: Path, record: CalibrationRecord, seen: dict[str, GraphInputs]) -> None:
    tensors: dict[str, np.ndarray] = {}
    for graph, layer, sample in ((graph, *found) for graph, inputs in seen.items() for found in inputs.samples.items()):
        if not np.isfinite(sample.maximum).all():
            raise ArtifactError(
                f"the input of {layer} of the {graph} is not finite",
                found=f"infinity or NaN in {record.precision}",
                wanted="finite numbers",
                fix="--dtype bf16, or --dtype fp32",
            )
        index = len(tensors) // 2
        tensors[f"{index}.maximum"], tensors[f"{index}.rows"] = sample.maximum, sample.rows
    partial, stated = partial_path(path), {"record": asdict(record), "layers": _numbered(seen)}
    try:
        save_file(tensors, partial, metadata={METADATA: json.dumps(stated)})
        partial.chmod(0o644)  # save_file makes it readable for the owner only
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
