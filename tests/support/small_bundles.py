"""Small bundles of real ONNX files with the contract's names and axes, made with onnx.helper."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sana_export.contract import GraphSpec, TensorSpec, resolve
from sana_export.files import file_entry
from sana_export.formats.dtypes import DTYPES
from sana_export.manifest import Checkpoint, GraphEntry, Manifest, ModelInfo, Options

DIMENSIONS = {"latent_channels": 4}
INSTRUCTION_TOKENS = 24
SLOW_WIDTH = 64


def model_info(sample_size: int = 16) -> ModelInfo:
    return ModelInfo(
        sample_size=sample_size,
        latent_channels=4,
        vae_scale_factor=32,
        timestep_scale=1.0,
        text_channels=8,
        embedding_rows=16,
        scheduler={},
        instruction="",
        max_sequence_length=300,
        default_steps=20,
        default_guidance_scale=4.5,
    )


def write_onnx(path: Path, spec: GraphSpec, nodes: Iterable[Any], weights: dict[str, Any], *, external: bool = False) -> None:
    """An ONNX file of `spec` made of `nodes` and `weights` (arrays or tensors of onnx).

    With `external`, every weight lies in `<name>.data` beside it.
    """

    def values(tensors: tuple[TensorSpec, ...]) -> list[Any]:
        return [helper.make_tensor_value_info(tensor.name, DTYPES[tensor.dtype].onnx, list(tensor.shape)) for tensor in tensors]

    initializers = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value), name)
        for name, value in weights.items()
    ]
    graph = helper.make_graph(list(nodes), spec.name, values(spec.inputs), values(spec.outputs), initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    location = f"{path.name}.data" if external else None
    onnx.save(model, path, save_as_external_data=external, location=location, size_threshold=0)


def sampler(path: Path, seed: int) -> GraphSpec:
    """float32 inputs with the axes batch, branches and both latent sizes; no weights of its own."""
    spec = resolve("sampler", DIMENSIONS, "float16")
    nodes = [
        helper.make_node("Reshape", ["weights", "column"], ["w"]),
        helper.make_node("Mul", ["noise_pred", "w"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "axis"], ["guided"], keepdims=0),
        helper.make_node("Gather", ["coefficients", "first"], ["c"], axis=0),
        helper.make_node("Mul", ["guided", "c"], ["scaled"]),
        helper.make_node("Add", ["latents", "scaled"], ["x0"]),
        helper.make_node("Add", ["previous_x0", "noise"], ["other"]),
        helper.make_node("Add", ["x0", "other"], ["next_latents"]),
    ]
    column = np.array([-1, 1, 1, 1, 1], np.int64)
    write_onnx(path, spec, nodes, {"column": column, "axis": np.array([0], np.int64), "first": np.array(seed % 6)})
    return spec


def vae_decoder(path: Path, seed: int) -> GraphSpec:
    """float32 in and out, float16 inside, its weights in an external file."""
    spec = resolve("vae_decoder", DIMENSIONS, "float16")
    weight = np.random.default_rng(seed).standard_normal((3 * 32 * 32, 4, 3, 3)).astype(np.float16)
    nodes = [
        helper.make_node("Cast", ["latents"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "weight"], ["blocks"], pads=[1, 1, 1, 1], name="decode"),
        helper.make_node("DepthToSpace", ["blocks"], ["pixels"], blocksize=32),
        helper.make_node("Cast", ["pixels"], ["image"], to=TensorProto.FLOAT),
    ]
    write_onnx(path, spec, nodes, {"weight": weight}, external=True)
    return spec


def slow(path: Path, seed: int, layers: int = 60) -> GraphSpec:
    """Many small attention layers: a few megabytes that the compiler works on for about ten seconds."""
    width, rng = SLOW_WIDTH, np.random.default_rng(seed)
    spec = GraphSpec(
        "slow",
        (TensorSpec("inputs_embeds", "float32", ("batch", "tokens", width)),),
        (TensorSpec("prompt_embeds", "float32", ("batch", "tokens", width)),),
    )
    weights = {"split": np.array([0, 0, 16, width // 16], np.int64), "join": np.array([0, 0, width], np.int64)}
    nodes = [helper.make_node("Cast", ["inputs_embeds"], ["x0"], to=TensorProto.FLOAT16)]
    for layer in range(layers):
        for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            weights[f"{name}{layer}.w"] = (rng.standard_normal((width, width)) * 0.02).astype(np.float16)
            nodes += [
                helper.make_node("MatMul", [f"x{layer}", f"{name}{layer}.w"], [f"{name}{layer}.flat"]),
                helper.make_node("Reshape", [f"{name}{layer}.flat", "split"], [f"{name}{layer}.heads"]),
                helper.make_node("Transpose", [f"{name}{layer}.heads"], [f"{name}{layer}"], perm=order),
            ]
        nodes += [
            helper.make_node("MatMul", [f"q{layer}", f"k{layer}"], [f"logits{layer}"]),
            helper.make_node("Softmax", [f"logits{layer}"], [f"softmax{layer}"]),
            helper.make_node("MatMul", [f"softmax{layer}", f"v{layer}"], [f"heads{layer}"]),
            helper.make_node("Transpose", [f"heads{layer}"], [f"merged{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"merged{layer}", "join"], [f"attention{layer}"]),
            helper.make_node("Add", [f"attention{layer}", f"x{layer}"], [f"x{layer + 1}"]),
        ]
    nodes.append(helper.make_node("Cast", [f"x{layers}"], ["prompt_embeds"], to=TensorProto.FLOAT))
    write_onnx(path, spec, nodes, weights)
    return spec


MAKERS: dict[str, Callable[[Path, int], GraphSpec]] = {"sampler": sampler, "vae_decoder": vae_decoder, "slow": slow}


def write_instruction(bundle: Path, tokens: int = INSTRUCTION_TOKENS) -> None:
    from safetensors.numpy import save_file

    save_file({"prefix": np.zeros((2, 2, 1, tokens, 4), np.float32)}, bundle / "instruction.safetensors")


def write_bundle(bundle: Path, graphs: Iterable[str] = ("sampler", "vae_decoder"), seed: int = 0) -> Manifest:
    """A bundle with the small `graphs` and a sealed manifest; engines of an older manifest there are kept."""
    bundle.mkdir(parents=True, exist_ok=True)
    write_instruction(bundle)
    entries = {}
    for name in graphs:
        path = bundle / "onnx" / name / "model.onnx"
        for old in path.parent.glob("*"):
            old.unlink()
        spec = MAKERS[name](path, seed)
        data = tuple(file_entry(bundle, other) for other in path.parent.glob("*.data"))
        entries[name] = GraphEntry(spec, file_entry(bundle, path), data, opset=20, parameters=0)
    engines = Manifest.load(bundle).engines if (bundle / "manifest.json").is_file() else ()
    manifest = Manifest(
        checkpoint=Checkpoint("test", None, "0" * 64, None, synthetic=True),
        options=Options("fp16", clamp=False, pag_layers=(1,)),
        model=model_info(),
        graphs=entries,
        files=(file_entry(bundle, bundle / "instruction.safetensors"),),
        export_key="0" * 64,
        engines=engines,
    )
    manifest.save(bundle)
    return manifest
