"""The inputs that a run of the runtime gives each graph, so that a graph can be run alone on real values.

The run computes in float32, with the weights of the bundle. So what one graph computes wrong in half precision does not reach the
inputs of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch

from sana_export.contract import DECODERS, ENCODERS, GraphSpec
from sana_export.errors import ParityError, UsageError
from sana_export.export.evaluator import TensorEvaluator
from sana_export.export.example_inputs import CHECK_SIZES, random_inputs
from sana_export.formats.arrays import Array
from sana_export.formats.dtypes import DTYPES
from sana_export.known_files import hash_always
from sana_export.manifest import Manifest
from sana_export.profiles import DECODER_TILE
from sana_export.runtime import SanaRuntime
from sana_export.runtime.control import CONTROLNET_GRAPHS
from sana_export.runtime.request import Request
from sana_export.verify.bundle import PAG_SCALE, Sampling
from sana_export.verify.evaluator_backend import EvaluatorBackend, evaluator_backend

#: The first of verify's prompts, with its sizes and steps.
DEFAULT_SAMPLING = Sampling()
#: The graphs that run in every step.
STEP_GRAPHS = frozenset({"denoiser", "sampler", "blend", "controlnet"})
_IN_TILES = DECODERS[True] | ENCODERS[True]
_OF_IMAGES = {"blend", *ENCODERS[False], *ENCODERS[True]}


class Recorder:
    """An evaluator that computes in float32 and keeps the inputs of some of its calls."""

    def __init__(self, path: Path, calls: Iterable[int], threads: int | None) -> None:
        outputs = [value.name for value in onnx.load(path, load_external_data=False).graph.output]
        self._evaluator = TensorEvaluator(path, outputs, threads, arithmetic="float32")
        self._calls, self._count = frozenset(calls), 0
        #: Number of the call, from 1, to its inputs.
        self.feeds: dict[int, dict[str, Array]] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._count += 1
        if self._count in self._calls:
            self.feeds[self._count] = {name: np.array(value) for name, value in feeds.items()}
        return self._evaluator.run(feeds)


def record_inputs(
    bundle: Path, graphs: Iterable[str], sampling: Sampling = DEFAULT_SAMPLING, *, step: int = 1, threads: int | None = None
) -> dict[str, dict[str, Array]]:
    """The inputs by name that each of `graphs` gets when the first prompt of `sampling` is drawn; in a loop, those of `step`.

    Graphs for tiles, images and ControlNets get them from runs with tiles, and with a color gradient as the image. float16 inputs
    are float16; bfloat16 ones are float32 with values of bfloat16. Raises UsageError if a run does not reach a graph or has fewer
    steps, and ParityError if an input exceeds its dtype, because another graph is at fault then.
    """
    manifest = Manifest.load(bundle)
    wanted = {graph: step if graph in STEP_GRAPHS else 1 for graph in graphs}
    backend = evaluator_backend(partial(Recorder, calls={1, step}, threads=threads), "float32")
    found: dict[str, dict[str, Array]] = {}
    with hash_always(), SanaRuntime.from_pretrained(bundle, backend=backend, prompt_cache_bytes=0) as runtime:
        evaluators = cast(EvaluatorBackend, runtime.backend).evaluators
        for kind in dict.fromkeys(map(_kind, wanted)):
            evaluators.clear()
            runtime.sessions.clear()
            of_kind = {graph: call for graph, call in wanted.items() if _kind(graph) == kind}
            for _ in _stages(runtime, _request(kind, manifest, sampling)):
                found |= {
                    graph: cast(Recorder, evaluators[graph]).feeds[call]
                    for graph, call in of_kind.items()
                    if graph in evaluators and call in cast(Recorder, evaluators[graph]).feeds
                }
                if found.keys() >= of_kind.keys():
                    break
            if lacking := [graph for graph in of_kind if graph not in found]:
                raise UsageError(
                    f"a run with the prompt {sampling.prompts[0]!r} does not reach {', '.join(lacking)} at step {step}",
                    found=f"{sampling.steps or 'the default number of'} steps",
                    wanted="a step that runs, and a prompt that is not empty",
                    fix="--step 1 --prompt 'a red apple'",
                )
    return {graph: _stored_inputs(bundle, manifest.graphs[graph].spec, found[graph]) for graph in wanted}


def drawn_inputs(spec: GraphSpec, seed: int) -> dict[str, Array]:
    """Random inputs of a graph by name, as the export's own check draws them."""
    return {
        name: value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
        for name, value in random_inputs(spec, CHECK_SIZES, seed).items()
    }


def stored(values: Array, dtype: str) -> Array:
    """`values` rounded to `dtype`, a name of formats/dtypes.py. bfloat16 comes as float32, because numpy does not have it."""
    kind = DTYPES[dtype]
    with np.errstate(over="ignore"):
        rounded = kind.round(np.asarray(values))
    return kind.widen(rounded) if dtype == "bfloat16" else rounded


def _stored_inputs(bundle: Path, spec: GraphSpec, feeds: Mapping[str, Array]) -> dict[str, Array]:
    inputs = {tensor.name: stored(feeds[tensor.name], tensor.dtype) for tensor in spec.inputs}
    if bad := [name for name, value in inputs.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]:
        raise ParityError(
            f"an input of {spec.name} is not finite",
            found=f"{', '.join(bad)}, which another graph of {bundle} computes",
            wanted="inputs within the range of their dtype",
            fix="look at the other graph first: --layers with text_encoder, context or denoiser",
        )
    return inputs


#: What a run needs beside a prompt: tiles, an image, a control image.
_Kind = tuple[bool, bool, bool]
#: Side of a tile in image pixels: the smallest that engines are built for (profiles.py).
_TILE = DECODER_TILE // 4


def _kind(graph: str) -> _Kind:
    return graph in _IN_TILES, graph in _OF_IMAGES, graph in CONTROLNET_GRAPHS


def _request(kind: _Kind, manifest: Manifest, sampling: Sampling) -> Request:
    in_tiles, with_image, with_control = kind
    request = sampling.request(sampling.prompts[0], manifest.model, PAG_SCALE if manifest.options.pag_layers else 0.0)
    assert request.height is not None
    assert request.width is not None
    changes: dict[str, Any] = {"decoder_tile": _TILE if in_tiles else 0}
    if with_image:
        mask = np.zeros((request.height, request.width), np.float32)
        mask[:, request.width // 2 :] = 1.0
        changes |= {"image": _gradient(request.height, request.width), "mask": mask, "strength": 1.0}
    if with_control:
        changes["control_image"] = _gradient(request.height, request.width)
    return replace(request, **changes)


def _gradient(height: int, width: int) -> Array:
    """A smooth image, float32 [height, width, 3] in [0, 1]."""
    rows, columns = np.linspace(0, 1, height, dtype=np.float32), np.linspace(0, 1, width, dtype=np.float32)
    down, across = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([down, across, 1 - down * across], axis=-1)


def _stages(runtime: SanaRuntime, request: Request) -> Iterator[None]:
    """Draw an image, and yield after each stage and each step."""
    plan = runtime.plan(request)
    conditioning = runtime.encode(plan)
    yield
    latents = None
    for step in runtime.steps(plan, conditioning):
        latents = step.latents
        yield
    runtime.decode(plan, latents)
    yield
