"""The manifest of a bundle: a record of everything in it, bound by hashes.

A bundle is a folder with `manifest.json` at its top. The manifest lists every other file of the bundle as a `FileEntry`, with a
path relative to the bundle. It contains a hash of its own content, so an edit by hand is noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana_export import __version__
from sana_export.commands import export_command, first_export_command
from sana_export.contract import GraphSpec, TensorSpec
from sana_export.errors import ArtifactError
from sana_export.files import FileEntry, write_whole
from sana_export.records import (
    PRECISIONS,
    Checkpoint,
    EngineEntry,
    GraphEntry,
    LoraTarget,
    ModelInfo,
    Options,
    Overlay,
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
    "parse_graph",
    "parse_spec",
]

FORMAT = 2
FILE_NAME = "manifest.json"
#: What parsing a document of another shape can raise.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)


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
        if (found := seal(document)) != sealed:
            raise ArtifactError(
                f"{bundle / FILE_NAME} was edited after it was written",
                found=f"content hash {found[:16]}",
                wanted=f"content hash {str(sealed)[:16]}",
                fix=_export_again(bundle, document),
            )
        try:
            return _parse(document)
        except _MALFORMED as error:
            raise _damaged(bundle, error, document) from error


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
            found=f"no {FILE_NAME}",
            wanted="a folder made by `sana-export export`",
            fix=_export_again(bundle, None),
        )
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise _damaged(bundle, error, None) from error


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
        return export_command(bundle, _Origin(_parse_checkpoint(document["checkpoint"]), _parse_options(document["options"])))
    except _MALFORMED:
        return f"sana-export export MODEL -o {bundle}, with the checkpoint that it was exported from as MODEL"


@dataclass(frozen=True)
class _Origin:
    """What a bundle was exported from, and how."""

    checkpoint: Checkpoint
    options: Options


def parse_spec(entry: Mapping[str, Any]) -> GraphSpec:
    """The graph that `dataclasses.asdict` turned into `entry`."""

    def tensors(entries: Iterable[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(tensor["name"], tensor["dtype"], tuple(tensor["shape"])) for tensor in entries)

    return GraphSpec(entry["name"], tensors(entry["inputs"]), tensors(entry["outputs"]))


def parse_graph(entry: Mapping[str, Any]) -> GraphEntry:
    """The entry that `dataclasses.asdict` turned into `entry`."""
    return GraphEntry(
        parse_spec(entry["spec"]),
        FileEntry(**entry["onnx"]),
        tuple(FileEntry(**file) for file in entry["data"]),
        entry["opset"],
        entry["parameters"],
        tuple(map(_parse_target, entry.get("lora_targets", ()))),
    )


def _parse_target(entry: Mapping[str, Any]) -> LoraTarget:
    rows = entry["source_rows"]
    shapes = {name: tuple(entry[name]) for name in ("shape", "initializer_shape")}
    return LoraTarget(**{**entry, **shapes, "source_rows": None if rows is None else tuple(rows)})


def _parse_engine(entry: Mapping[str, Any]) -> EngineEntry:
    ranges = {axis: tuple(values) for axis, values in entry["ranges"].items()}
    capabilities = tuple(entry["compute_capabilities"])
    return EngineEntry(**{**entry, "file": FileEntry(**entry["file"]), "ranges": ranges, "compute_capabilities": capabilities})


def _parse_checkpoint(entry: Mapping[str, Any]) -> Checkpoint:
    single = {name: Overlay(**entry[name]) if entry.get(name) else None for name in ("transformer", "vae")}
    return Checkpoint(**{**entry, **single, "loras": tuple(Overlay(**lora) for lora in entry.get("loras", ()))})


def _parse_options(entry: Mapping[str, Any]) -> Options:
    return Options(**{**entry, "pag_layers": tuple(entry["pag_layers"])})


def _parse(document: Mapping[str, Any]) -> Manifest:
    return Manifest(
        checkpoint=_parse_checkpoint(document["checkpoint"]),
        options=_parse_options(document["options"]),
        model=ModelInfo(**document["model"]),
        graphs={name: parse_graph(entry) for name, entry in document["graphs"].items()},
        files=tuple(FileEntry(**file) for file in document["files"]),
        export_key=document["export_key"],
        engines=tuple(map(_parse_engine, document["engines"])),
        parity=document["parity"],
        tool_version=document["tool_version"],
        format=document["format"],
    )
