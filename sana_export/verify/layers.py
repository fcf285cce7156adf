"""`verify --layers`: where in a graph two ways to compute it begin to differ.

Every float tensor of the graph becomes an output of both, and Polygraphy compares them. On a CPU one way is float32 throughout. The
other one rounds every half-precision tensor as a GPU stores it, or, for an fp32 bundle, lets ONNX Runtime optimize the graph. The
drift begins at the first tensor, in the order of the nodes, that misses the limit and from which tensors that miss it lead to an
output. A tensor that misses it and whose consumers do not is harmless: a rounded number has a large relative error if it is the
reciprocal of a small sum.

With another bundle as the reference, wrong weights show too, which both ways have in common otherwise.

Memory is bounded: tensors are compared in chunks of at most `CHUNK_BYTES`, each in a run of the part of the graph that they need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from sana_export.commands import export_command
from sana_export.errors import UsageError
from sana_export.export.evaluator import TensorEvaluator
from sana_export.export.parity import COSINE_LIMITS
from sana_export.formats.arrays import Array
from sana_export.manifest import Manifest
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.runtime.memory import AUTO
from sana_export.user_paths import user_path
from sana_export.verify.bundle import Sampling
from sana_export.verify.graph_file import GraphFile, nodes_of, open_graph
from sana_export.verify.graph_layers import TensorOrigin, tensor_origins
from sana_export.verify.layer_report import LayerReport, TensorRow
from sana_export.verify.layer_sides import ENGINES, Side, SideChoice, float32_side
from sana_export.verify.layer_tensors import CHUNK_BYTES, chunks, compare
from sana_export.verify.polygraphy_package import comparator
from sana_export.verify.recorded_inputs import DEFAULT_SAMPLING, drawn_inputs, record_inputs
from sana_export.verify.reproducer import reproducer_folder, save_reproducer


@dataclass(frozen=True)
class LayerCheck:
    """What to compare, and how."""

    #: The graph's name.
    graph: str
    #: The step whose inputs a graph of the loop gets, from 1.
    step: int = 1
    #: Lowest signal-to-noise ratio in dB. None: what `verify` demands of a graph's output in the bundle's precision.
    limit_db: float | None = None
    #: Draw the inputs with the seed of the sampling, and sample nothing.
    random_inputs: bool = False
    #: The backend that is compared with float32 (`SideChoice`).
    backend: str = AUTO
    #: A bundle whose graph, in float32, is the reference. None: the bundle itself.
    against: Path | None = None
    #: Folder for the reproducer. None: "<graph>-drift" in the current folder.
    reproducer: Path | None = None


def snr_limit(precision: str) -> float:
    """The signal-to-noise ratio in dB of the largest relative error that `compare_tensors` permits in `precision`."""
    return -10 * math.log10(2 * (1 - COSINE_LIMITS[precision]))


def compare_layers(
    bundle: Path,
    check: LayerCheck,
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    device: int | None = None,
    threads: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> LayerReport:
    """Compare every float tensor of one graph of a bundle, and save a reproducer of the first one that drifts.

    The inputs are those that a run of the first prompt with the reference's bundle gives the graph. Raises UsageError for a graph
    that the bundle does not have, for a reference with another graph and for a backend that cannot return intermediate tensors,
    DependencyError if Polygraphy or the backend is missing, and what `record_inputs` raises.
    """
    comparator(rtx=ENGINES.get(check.backend))  # before the long work
    bundle = user_path(bundle, "the bundle")
    manifest = Manifest.load(bundle)
    second = SideChoice(check.backend, manifest.options.dtype, device, threads)
    folder = check.reproducer or Path(f"{check.graph}-drift")
    reproducer_folder(folder)  # before the long work
    graph = open_graph(bundle, check.graph)
    reference = graph if check.against is None else _reference(bundle, graph, user_path(check.against, "--against"))
    on_progress(Progress("recording the inputs", 0, 1))
    if check.random_inputs:
        inputs = drawn_inputs(graph.entry.spec, sampling.seed)
    else:
        inputs = record_inputs(reference.bundle, [check.graph], sampling, step=check.step, threads=threads)[check.graph]
    origins = tensor_origins(graph.model, graph.entry.lora_targets)
    sides = float32_side(reference.path, threads), second.side(graph.path, graph.entry.spec, inputs)
    limit = snr_limit(manifest.options.precision) if check.limit_db is None else check.limit_db
    rows = [*_rows(sides, origins, inputs, graph.path, limit, threads, on_progress)]
    drifting = drifting_tensors(graph.model.graph, rows)
    report = LayerReport(
        str(bundle),
        check.graph,
        manifest.options.precision,
        (f"{reference.bundle} in float32" if check.against else sides[0].name, sides[1].name),
        f"random, seed {sampling.seed}" if check.random_inputs else f"the prompt {sampling.prompts[0]!r}, step {check.step}",
        limit,
        tuple(replace(row, drifts=row.origin.tensor in drifting) for row in rows),
    )
    return report if report.passed else save_reproducer(folder, graph, reference, origins, inputs, report, second)


def _reference(bundle: Path, graph: GraphFile, against: Path) -> GraphFile:
    """The graph of another bundle. Raises UsageError unless it has the same nodes, so that tensors of one name mean the same."""
    reference = open_graph(against, graph.entry.spec.name)
    if nodes_of(reference.model) != nodes_of(graph.model):
        manifest = Manifest.load(bundle)
        raise UsageError(
            f"{against} computes {graph.entry.spec.name} with other nodes than {bundle}",
            found=f"{len(reference.model.graph.node)} and {len(graph.model.graph.node)} nodes",
            wanted="a bundle of the same model, precision and options, exported by the same version",
            fix=export_command(bundle.with_name(f"{bundle.name}-fresh"), manifest),
        )
    return reference


def _rows(
    sides: Sequence[Side],
    origins: Sequence[TensorOrigin],
    inputs: Mapping[str, Array],
    path: Path,
    limit: float,
    threads: int | None,
    on_progress: OnProgress,
) -> Iterator[TensorRow]:
    """One row for each tensor, in order."""
    names = [origin.tensor for origin in origins]
    shapes = TensorEvaluator(path, names, threads, arithmetic="float32", shapes=True).run(inputs)
    done = 0
    for chunk in chunks(origins, lambda origin: 4 * math.prod(map(int, shapes[origin.tensor])), CHUNK_BYTES):
        on_progress(Progress(f"comparing {len(chunk)} tensors", done, len(names)))
        wanted, found = (side.compute([origin.tensor for origin in chunk]).run(inputs) for side in sides)
        yield from compare(chunk, wanted, found, limit)
        done += len(chunk)


def drifting_tensors(graph: onnx.GraphProto, rows: Sequence[TensorRow]) -> set[str]:
    """The tensors of the rows that miss their limit, and from which such tensors, or others without a row, lead to an output."""
    missed, compared = {row.origin.tensor for row in rows if not row.passed}, {row.origin.tensor for row in rows}
    leading = {value.name for value in graph.output if value.name in missed or value.name not in compared}
    for node in reversed(graph.node):
        if leading.intersection(node.output):
            leading.update(name for name in node.input if name in missed or name not in compared)
    return leading & missed
