"""The ONNX file of one graph of a bundle, checked and opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from sana_export.commands import repair_command
from sana_export.errors import UsageError
from sana_export.export.evaluator_graphs import typed_model
from sana_export.files import check_files
from sana_export.formats.onnx_weights import check_external_data
from sana_export.known_files import hash_always
from sana_export.manifest import Manifest
from sana_export.records import GraphEntry


@dataclass(frozen=True, eq=False)
class GraphFile:
    """An ONNX file of a bundle."""

    #: The bundle's folder.
    bundle: Path
    #: What the manifest says about the graph.
    entry: GraphEntry
    #: The file.
    path: Path
    #: Its content with the dtype of every value. Its weights are on disk.
    model: onnx.ModelProto


def open_graph(bundle: Path, graph: str) -> GraphFile:
    """Hash the files of a graph, and open it. Raises UsageError if the bundle does not have it, ArtifactError if it is damaged."""
    manifest = Manifest.load(bundle)
    if graph not in manifest.graphs:
        raise UsageError(f"{bundle} has no graph named {graph}", wanted=", ".join(sorted(manifest.graphs)))
    entry, fix = manifest.graphs[graph], repair_command(bundle, manifest)
    with hash_always():
        path, *data = check_files(bundle, entry.files, fix=fix)
    check_external_data(path, data, fix=fix)
    return GraphFile(bundle, entry, path, typed_model(path))


def nodes_of(model: onnx.ModelProto) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Type, inputs and outputs of each node."""
    return [(node.op_type, tuple(node.input), tuple(node.output)) for node in model.graph.node]
