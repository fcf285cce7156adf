"""Layers of a graph in ONNX Runtime, from its profiler: the nodes of the optimized graph."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from sana_export.bench.nvtx_ranges import nvtx_range
from sana_export.bench.profile.profile import GraphRun, LayerTime
from sana_export.formats.linked_files import pass_linked_files
from sana_export.runtime.backends.onnxruntime import session_options
from sana_export.runtime.backends.onnxruntime_provider import CPU, check_provider, choose_provider


def layers(run: GraphRun) -> list[LayerTime]:
    """The median time of each node, in a session with the backend's options."""
    import onnxruntime

    options = session_options(onnxruntime)
    options.intra_op_num_threads = run.threads
    options.enable_profiling = True
    path = run.bundle / run.manifest.graphs[run.graph].onnx.path
    maps = pass_linked_files(options, path.read_bytes(), path.parent, path.resolve().parent)
    with tempfile.TemporaryDirectory(prefix="sana-export-profile-") as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        provider = choose_provider(onnxruntime)
        session = onnxruntime.InferenceSession(str(path), options, providers=list(dict.fromkeys((provider, CPU))))
        del maps  # the session has copied them
        check_provider(onnxruntime, session, provider, f"profiling {run.graph}")
        feeds = {name: tensor.numpy() for name, tensor in run.inputs.items()}
        for _ in range(1 + run.runs):
            with nvtx_range(run.graph):
                session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return node_layers(events, run.runs)


def node_layers(events: list[dict[str, Any]], runs: int) -> list[LayerTime]:
    """One layer for each node. Its time is the median of the last `runs` runs."""
    found: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found[event["name"].removesuffix("_kernel_time")].append((event["dur"], event["args"]))
    result = []
    for name, timed in found.items():
        arguments = timed[-1][1]
        moved = sum(int(arguments.get(key, 0)) for key in ("activation_size", "parameter_size", "output_size"))
        microseconds = statistics.median(duration for duration, _ in timed[-runs:])
        result.append(LayerTime(_shortened(name), arguments["op_name"], microseconds / 1e3, moved or None))
    return result


def _shortened(name: str) -> str:
    """The end of a node's name. Names of fused nodes are long, and a `|` would break the table."""
    return re.sub(r"[|/]+", "/", name)[-60:]
