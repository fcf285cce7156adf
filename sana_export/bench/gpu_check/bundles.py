"""The synthetic checkpoints and bundles that the parts run. They are made once and kept in the work folder.

The latency of a step, of the loop and of the decoder does not depend on the text encoder, whose 2.6 billion parameters would take
most of the time to make and export. It therefore has one layer of the published width. Transformer and decoder are the published
ones.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import CheckFailed, PartContext
from sana_export.child_process import run_module
from sana_export.quantization.method import NEAREST
from sana_export.quantization.schemes import SCHEMES
from sana_export.synth.recipes import RECIPES, SyntheticRecipe

_LARGE = RECIPES["sana-1600m-1024px"]
#: One layer of Gemma-2 at its published width, with the synthetic tokenizer's small vocabulary.
_ONE_LAYER = {**{key: value for key, value in _LARGE.text_encoder.items() if key != "vocab_size"}, "num_hidden_layers": 1}
#: Number of transformer blocks in the model "slice".
SLICE_BLOCKS = 2
#: Name to the recipe of the checkpoint.
MODELS: dict[str, SyntheticRecipe] = {
    "tiny-random": RECIPES["tiny-random"],
    # Two blocks of 1600M and one layer of the text encoder at their published widths, with tiny's small decoder.
    "slice": replace(
        _LARGE,
        name="gpu-check-slice",
        transformer={**_LARGE.transformer, "num_layers": SLICE_BLOCKS},
        text_encoder=_ONE_LAYER,
        vae=RECIPES["tiny-random"].vae,
    ),
    "600m": replace(RECIPES["sana-600m-1024px"], name="gpu-check-600m", text_encoder=_ONE_LAYER),
    "1600m": replace(_LARGE, name="gpu-check-1600m", text_encoder=_ONE_LAYER),
}
#: The dtype of the checkpoints, as the published ones are stored. fp16 means that they were trained with the clamp.
STORED = "float16"
#: Precision of the bundles.
PRECISION = "fp16"
#: The schemes that round the inputs of layers, and what they are calibrated with.
CALIBRATED = tuple(scheme.name for scheme in SCHEMES.values() if scheme.inputs)
CALIBRATION_PROMPT, CALIBRATION_SIZE = "a red apple on a table", 512


def checkpoint_of(context: PartContext, model: str, dtype: str = STORED) -> Any:
    """The opened checkpoint of a row of `MODELS`. It is made if it does not exist yet."""
    from sana_export.checkpoint.checkpoint import open_checkpoint
    from sana_export.environment import import_digest
    from sana_export.synth.checkpoint import make_checkpoint
    from sana_export.variants import INDEX

    folder = context.work / "checkpoints" / f"{model}-{dtype}-{import_digest('sana_export.synth.checkpoint')[:8]}"
    if not (folder / INDEX).is_file():
        make_checkpoint(MODELS[model], folder, dtype=dtype)
    return open_checkpoint(str(folder.resolve()))


def bundle_name(model: str, scheme: str | None) -> str:
    """The name of a model's bundle, quantized with `scheme` or not."""
    return model if scheme is None else f"{model}-{scheme}"


def exported(
    context: PartContext,
    checkpoint: Any,
    name: str,
    precision: str = PRECISION,
    pag_layers: Iterable[int] = (),
    graphs: Iterable[str] = (),
    quantize: str | None = None,
) -> Path:
    """Export the bundle `name` of a checkpoint, unless it is up to date. No `graphs` means all of them.

    `quantize`: the scheme of all parts that take one, with rounding to the nearest number, which exports fastest and adds no
    branches, and a short calibration if it needs one.
    """
    from sana_export.calibration.run import Calibration
    from sana_export.export.bundle import export_bundle

    bundle = context.work / "bundles" / name
    bundle.parent.mkdir(parents=True, exist_ok=True)
    words = [] if quantize is None else [quantize]
    measured = Calibration(prompts=[CALIBRATION_PROMPT], steps=2, size=CALIBRATION_SIZE) if quantize in CALIBRATED else None
    export_bundle(
        checkpoint,
        bundle,
        precision=precision,
        pag_layers=pag_layers,
        graphs=graphs,
        quantize=words,
        quantize_method=[NEAREST] if words else [],
        calibration=measured,
    )
    return bundle


def without_onnx(
    context: PartContext, checkpoint: Any, name: str, precision: str = PRECISION, pag_layers: Iterable[int] = ()
) -> Path:
    """A bundle for the torch backend only: its manifest lists the graphs, but there are no ONNX files."""
    from sana_export.contract import GRAPH_GROUPS
    from sana_export.export.bundle import model_info
    from sana_export.export.example_inputs import graph_spec
    from sana_export.export.options import choose_options
    from sana_export.export.text_files import EMBEDDINGS, INSTRUCTION, TOKENIZER, write_text_files
    from sana_export.files import FileEntry, file_entry
    from sana_export.manifest import GraphEntry, Manifest

    bundle = context.work / "bundles" / f"{name}-without-onnx"
    bundle.mkdir(parents=True, exist_ok=True)
    options = choose_options(checkpoint, precision, pag_layers, None)
    instruction = write_text_files(checkpoint, bundle)
    graphs = {
        graph: GraphEntry(graph_spec(graph, checkpoint, options), FileEntry(f"onnx/{graph}/not-exported", "", 0), (), 0, 0)
        for graph in GRAPH_GROUPS["default"]
    }
    files = tuple(file_entry(bundle, bundle / file) for file in (TOKENIZER, INSTRUCTION, EMBEDDINGS))
    model = model_info(checkpoint, instruction)
    Manifest(checkpoint.record(), options, model, graphs, files, export_key="without ONNX").save(bundle)
    return bundle


def build(bundle: Path, backend: str, *arguments: str) -> None:
    """Build a bundle's engines with the command line. Raises CheckFailed with the end of its output if that fails."""
    words = ["build", str(bundle), "--backend", backend, *arguments]
    done = run_module(
        "sana_export.cli.main",
        *words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)  # noqa: T201 (a part's output is its log)
    if done.returncode != 0:
        raise CheckFailed(f"{shlex.join(['sana-export', *words])} failed: {done.stdout.strip()[-800:]}")


def make(context: PartContext, *, model: str) -> Mapping[str, Any]:
    """The part that makes a checkpoint, and its bundle without ONNX files."""
    checkpoint = checkpoint_of(context, model)
    without_onnx(context, checkpoint, model)
    parameters = {part: checkpoint.weights(part).bytes // 2 for part in ("transformer", "vae", "text_encoder")}
    return {"parameters": parameters}


def export(context: PartContext, *, model: str, scheme: str | None = None) -> Mapping[str, Any]:
    """The part that exports the ONNX files, which all backends except torch run, or those with quantized weights."""
    bundle = exported(context, checkpoint_of(context, model), bundle_name(model, scheme), quantize=scheme)
    return {"bytes": sum(path.stat().st_size for path in bundle.glob("onnx/**/*") if path.is_file())}
