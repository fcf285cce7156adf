"""The manifest of a bundle: a record of everything in it, bound by hashes.

A bundle is a folder with `manifest.json` at its top. The manifest lists every other file of the bundle as a `FileEntry`, with a
path relative to the bundle. It contains a hash of its own content, so an edit by hand is noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana_export import __version__
from sana_export.commands import export_command, first_export_command
from sana_export.contract import GraphSpec
from sana_export.errors import ArtifactError, UsageError
from sana_export.files import FileEntry, check_inside, write_whole
from sana_export.formats.recognize import not_what_was_wanted, recognize
from sana_export.hub.names import may_be_hub_id
from sana_export.json_records import record_from_json
from sana_export.quantization.layers import PARTS
from sana_export.quantization.method import parse_method
from sana_export.quantization.schemes import SCHEMES
from sana_export.quantization.targets import portable_targets
from sana_export.records import (
    PRECISIONS,
    Checkpoint,
    EngineEntry,
    GraphEntry,
    LoraTarget,
    ModelInfo,
    Options,
    Overlay,
    QuantizedWeight,
    check_weight,
)
from sana_export.variants import INDEX

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "PRECISIONS",
    "Checkpoint",
    "EngineEntry",
    "GraphEntry",
    "LoraTarget",
    "Manifest",
    "ModelInfo",
    "Options",
    "Overlay",
    "QuantizedWeight",
    "parse_graph",
    "parse_spec",
]

FORMAT = 3
FILE_NAME = "manifest.json"
#: What parsing a document of another shape can raise.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
#: A manifest of Sana 4.8B with a hundred engines has 0.4 MB.
MAX_BYTES = 32 << 20
#: Pixels of the native image's side. Sana's largest is 4096.
MAX_NATIVE_SIZE = 16384
#: The least and the largest value of the model's numbers. A file that is not an export's must not exhaust memory.
_LIMITS: dict[str, tuple[float, float]] = {
    "sample_size": (1, 4096),
    "latent_channels": (1, 4096),
    "vae_scale_factor": (1, 1024),
    "timestep_scale": (1e-6, 1e6),
    "text_channels": (1, 1 << 17),
    "embedding_rows": (1, 1 << 24),
    "max_sequence_length": (1, 1 << 16),
    "default_steps": (1, 1000),
    "default_guidance_scale": (-1000, 1000),
    "decoder_tile_halo": (0, 4096),
    "decoder_tile_scale": (1, 1024),
    "encoder_tile_halo": (0, 4096),
    "encoder_tile_scale": (1, 1024),
}


@dataclass(frozen=True)
class Manifest:
    """The whole record."""

    #: The checkpoint that the bundle was exported from.
    checkpoint: Checkpoint
    #: How it was exported.
    options: Options
    #: What the runtime has to know about the checkpoint.
    model: ModelInfo
    #: The graphs by name.
    graphs: Mapping[str, GraphEntry]
    #: The files that belong to no graph: tokenizer, instruction and embeddings.
    files: tuple[FileEntry, ...]
    #: Hash of everything that decides what the export wrote.
    export_key: str
    #: The engines, in the order in which they were built.
    engines: tuple[EngineEntry, ...] = ()
    #: The last report of `verify`, as JSON.
    parity: Mapping[str, Any] | None = None
    #: The version of sana_export that wrote the manifest.
    tool_version: str = __version__
    #: The version of the manifest's format.
    format: int = FORMAT

    def with_engine(self, engine: EngineEntry) -> Manifest:
        """A copy with `engine`, which replaces an engine of the same graph, backend and key."""
        same = (engine.graph, engine.backend, engine.key)
        kept = tuple(entry for entry in self.engines if (entry.graph, entry.backend, entry.key) != same)
        return replace(self, engines=(*kept, engine))

    def entry(self, bundle: Path, path: str) -> FileEntry:
        """The entry of the file at `path` that belongs to no graph. Raises ArtifactError if the manifest of `bundle` has none."""
        found = next((entry for entry in self.files if entry.path == path), None)
        if found is None:
            raise ArtifactError(
                f"{bundle / FILE_NAME} does not list {path}",
                found=", ".join(entry.path for entry in self.files) or "no files",
                wanted=path,
                fix=export_command(bundle, self),
            )
        return found

    def save(self, bundle: Path) -> None:
        """Write `manifest.json`, whole or not at all. Raises DependencyError if the disk refuses."""
        document = dataclasses.asdict(self)
        document["sha256"] = seal(document)
        write_whole(bundle / FILE_NAME, json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n")

    @classmethod
    def load(cls, bundle: Path) -> Manifest:
        """Read and check `manifest.json`. Raises ArtifactError if it is missing, damaged, edited or of another version."""
        document = _read(bundle)
        sealed = _check_version(bundle, document)
        try:
            found = seal(document)
        except _MALFORMED as error:  # a text that is not Unicode, or nested too deep
            raise _damaged(bundle, error, document) from error
        if found != sealed:
            raise ArtifactError(
                f"{bundle / FILE_NAME} was edited after it was written",
                found=f"content hash {found[:16]}",
                wanted=f"content hash {str(sealed)[:16]}",
                fix=_export_again(bundle, document),
            )
        try:
            manifest = _parse(document)
        except _MALFORMED as error:
            raise _damaged(bundle, error, document) from error
        for entry in manifest.entries():
            check_inside(bundle, entry.path, fix=export_command(bundle, manifest))
        return manifest

    def entries(self) -> Iterator[FileEntry]:
        """Every file that the manifest names."""
        yield from self.files
        for graph in self.graphs.values():
            yield from graph.files
        yield from (engine.file for engine in self.engines)


def seal(document: Mapping[str, Any]) -> str:
    """The hash of a manifest's content, which is `document` without its key "sha256"."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(bundle: Path) -> Any:
    path = bundle / FILE_NAME
    if not path.is_file() and (bundle / INDEX).is_file():
        raise ArtifactError(
            f"{bundle} is a checkpoint, not a bundle",
            found=INDEX,
            wanted=f"{FILE_NAME}, in a folder made by `sana-export export`",
            fix=first_export_command(bundle),
        )
    if not path.is_file():
        raise ArtifactError(
            f"{bundle} is not a bundle",
            found=f"no {FILE_NAME}" if bundle.is_dir() else "a file" if bundle.exists() else "no such folder",
            wanted="a folder made by `sana-export export`",
            fix=_export_again(bundle, None) if bundle.is_dir() else _other_place(bundle),
        )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        return json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # too large, not JSON, or not UTF-8
        if recognize(path) is not None:
            raise not_what_was_wanted(path, "a manifest", error, fix=_export_again(bundle, None)) from error
        raise _damaged(bundle, error, None) from error


def _other_place(bundle: Path) -> str:
    """What to do if there is no folder `bundle`."""
    fix = "check the path, or export a checkpoint first"
    if not may_be_hub_id(name := bundle.as_posix()):
        return fix
    return f"{fix}; if it is a repository of the hub: {shlex.join(['sana-export', 'pull', name, '-o', bundle.name])}"


def _check_version(bundle: Path, document: Any) -> object:
    """Raise ArtifactError unless this version of sana_export reads `document`. Takes its hash out and returns it."""
    try:
        found, sealed, written_by = document["format"], document.pop("sha256"), str(document.get("tool_version"))
    except _MALFORMED as error:
        raise _damaged(bundle, error, document) from error
    if found != FORMAT or _series(written_by) != _series(__version__):
        raise ArtifactError(
            f"{bundle / FILE_NAME} was written by another version of sana-export",
            found=f"format {found}, written by {written_by}",
            wanted=f"format {FORMAT}, written by {__version__}",
            fix=_export_again(bundle, document),
        )
    return sealed


def _series(version: str) -> list[str]:
    """Major and minor version. Patch releases read each other's bundles."""
    return version.split(".")[:2]


def _damaged(bundle: Path, error: Exception, document: Any) -> ArtifactError:
    return ArtifactError(
        f"{bundle / FILE_NAME} is damaged", found=repr(error), wanted="a manifest", fix=_export_again(bundle, document)
    )


def _export_again(bundle: Path, document: Any) -> str:
    """The command that exports the bundle again, from as much of the manifest as can be read."""
    try:
        checkpoint, options = record_from_json(Checkpoint, document["checkpoint"]), record_from_json(Options, document["options"])
        origin = _Origin(checkpoint, options, tuple(document.get("graphs", ())))
        return export_command(bundle, origin)
    except _MALFORMED:
        command = shlex.join(["sana-export", "export", "MODEL", "-o", str(bundle)])
        return f"{command}  (MODEL: the checkpoint that it was exported from)"


@dataclass(frozen=True)
class _Origin:
    """What a bundle was exported from, how, and the names of its graphs."""

    checkpoint: Checkpoint
    options: Options
    graphs: tuple[str, ...]


def parse_spec(entry: Mapping[str, Any]) -> GraphSpec:
    """The graph that `dataclasses.asdict` turned into `entry`. Raises ValueError."""
    return record_from_json(GraphSpec, entry, "spec")


def parse_graph(entry: Mapping[str, Any]) -> GraphEntry:
    """The entry that `dataclasses.asdict` turned into `entry`. Raises ValueError."""
    return record_from_json(GraphEntry, entry, "graph")


def _parse(document: Mapping[str, Any]) -> Manifest:
    manifest = record_from_json(Manifest, document, "manifest")
    for name, (least, most) in _LIMITS.items():
        if not least <= (value := getattr(manifest.model, name)) <= most:
            raise ValueError(f"manifest.model.{name} is {value}, not from {least} to {most}")
    if manifest.options.precision not in PRECISIONS:
        raise ValueError(f"manifest.options.precision is {manifest.options.precision!r}")
    for part, scheme in manifest.options.quantize.items():
        if part not in PARTS or scheme not in SCHEMES:
            raise ValueError(f"manifest.options.quantize has {part!r}: {scheme!r}")
    try:
        parse_method(manifest.options.quantize_method)
    except UsageError as error:
        raise ValueError(f"manifest.options.quantize_method has {error.found}") from error
    for graph in manifest.graphs.values():
        for weight in graph.quantized:
            check_weight(weight)
    for scale in (manifest.model.decoder_tile_scale, manifest.model.encoder_tile_scale):
        if manifest.model.vae_scale_factor % scale:
            raise ValueError(f"manifest.model has tiles of {scale} pixels that do not divide {manifest.model.vae_scale_factor}")
    if manifest.model.sample_size * manifest.model.vae_scale_factor > MAX_NATIVE_SIZE:
        raise ValueError(f"manifest.model has images of {manifest.model.native_size} pixels")
    return replace(manifest, engines=tuple(_with_targets(engine, manifest.options) for engine in manifest.engines))


def _with_targets(engine: EngineEntry, options: Options) -> EngineEntry:
    """`engine` with the compute capabilities that it contains.

    `build` refuses a portable engine of a scheme that some of its GPUs lack. Earlier it did not, and TensorRT-RTX left those out.
    """
    scheme = options.scheme(engine.graph)
    if scheme is None or engine.compute_capabilities or engine.backend != "tensorrt-rtx":
        return engine
    return replace(engine, compute_capabilities=portable_targets(scheme))
