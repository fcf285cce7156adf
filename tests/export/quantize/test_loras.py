"""LoRAs and every scheme: folded in before the rounding, or refused at run time with the command that does so."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sana_export.adapters import Lora
from sana_export.calibration.run import Calibration, calibrate
from sana_export.checkpoint.checkpoint import SanaCheckpoint, open_checkpoint
from sana_export.errors import UsageError
from sana_export.export.graph_files import export_graphs
from sana_export.export.quantize.statistics import CalibrationFile
from sana_export.export.quantize.weights import built
from sana_export.graphs.builders import shape_graph
from sana_export.graphs.storage import WeightFile
from sana_export.manifest import Manifest
from sana_export.quantization.schemes import SCHEMES
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.quantized_weights import read_quantized
from tests.support.command_line import Cli
from tests.support.lora_files import diffusers_lora, load_transformer, pair, write

SCALE, RANK, ALPHA = 0.7, 4, 7
SMALL: dict[str, Any] = {"height": 64, "width": 64, "use_resolution_binning": False, "num_inference_steps": 1}
DRAWN = Calibration(prompts=["a red apple"], steps=2, rows=64)
#: A scheme's own method; `nvfp4` also with factors, some of which multiply the weights of the layer before.
KINDS = {**{name: (name, ()) for name in SCHEMES}, "nvfp4, rescaled": ("nvfp4", ("rescale", "search", "low-rank=4"))}


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: SanaCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "style"
    return diffusers_lora(load_transformer(tiny_checkpoint), folder, r=RANK, lora_alpha=ALPHA)


@pytest.fixture(scope="module")
def merged(tiny_checkpoint: SanaCheckpoint, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> SanaCheckpoint:
    """A checkpoint with other weights: W + scale * alpha / r * B A. No LoRA belongs to it."""
    transformer, tensors = load_transformer(tiny_checkpoint), load_file(lora / "pytorch_lora_weights.safetensors")
    for name, down in tensors.items():
        if ".lora_A." in name:
            weight = transformer.get_submodule(name.removeprefix("transformer.").partition(".lora_A")[0]).weight
            product = tensors[name.replace("lora_A", "lora_B")].flatten(1).double() @ down.flatten(1).double()
            weight.data += (SCALE * ALPHA / RANK * product).float().view(weight.shape)
    folder = shutil.copytree(tiny_checkpoint.folder, tmp_path_factory.mktemp("merged") / "checkpoint")
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def calibration(tiny_checkpoint: SanaCheckpoint, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> CalibrationFile:
    """Of the checkpoint with the LoRA. The others take it too, so that only their weights can differ."""
    own = open_checkpoint(tiny_checkpoint.source, loras=[Lora(lora, SCALE)])
    path = tmp_path_factory.mktemp("calibration") / "measured.safetensors"
    return calibrate(own, path, DRAWN, parts=("denoiser",), precision="fp32")


@pytest.fixture(scope="module", params=KINDS)
def bundle(
    request: Any, tiny_bundle: Path, tiny_checkpoint: Any, calibration: CalibrationFile, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The bundle of the plain checkpoint with a quantized denoiser."""
    scheme, words = KINDS[request.param]
    own = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundle") / "bundle"))
    manifest = Manifest.load(own)
    options = replace(manifest.options, quantize={"denoiser": scheme}, quantize_method=words)
    graphs = {**manifest.graphs, **export_graphs("denoiser", ["denoiser"], tiny_checkpoint, options, own, calibration)}
    replace(manifest, options=options, graphs=graphs).save(own)
    return own


def refused(bundle: Path, lora: Path) -> UsageError:
    """How a runtime of `bundle` refuses `lora`, after which it has no LoRA and the weights that it had."""
    fp4 = Manifest.load(bundle).options.scheme("denoiser") == "nvfp4"
    with SanaRuntime.from_pretrained(bundle, backend="torch" if fp4 else "onnxruntime") as runtime:
        plain = np.asarray(runtime("a red apple", seed=1, **SMALL).images[0])
        with pytest.raises(UsageError, match=r"is quantized: the LoRA .* cannot change its weights") as caught:
            runtime.load_lora(lora, SCALE)
        assert not runtime.loras
        assert (np.asarray(runtime("a red apple", seed=1, **SMALL).images[0]) == plain).all()
        # Cross-attention's keys and values are in the graph `context`, which is not quantized.
        key = "transformer.transformer_blocks.0.attn2.to_k"
        runtime.load_lora(write(lora.parent / "key", {name: 0.1 + value for name, value in pair(key, width=128).items()}))
        assert (np.asarray(runtime("a red apple", seed=1, **SMALL).images[0]) != plain).any()
    return caught.value


def layers(bundle: Path, checkpoint: SanaCheckpoint) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The weight of each quantized layer of a bundle's denoiser, with its branch, and its other tensors."""
    manifest = Manifest.load(bundle)
    module = shape_graph("denoiser", checkpoint, manifest.options)
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    found = {}
    for layer in read_quantized(bundle, manifest.graphs["denoiser"], "float32", fix=""):
        found[layer.weight.name] = (
            torch.from_numpy(layer.numbers(shapes[layer.weight.name])),
            {end: torch.from_numpy(values).flatten() for end, values in layer.tensors.items()},
        )
    return found


def share_of_others(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of numbers that differ by more than float32 rounding."""
    assert found.shape == wanted.shape
    return float(((found - wanted).abs() > 1e-5 * wanted.abs().max()).double().mean())


def test_a_lora_is_folded_in_before_the_rounding(
    bundle: Path,
    lora: Path,
    merged: SanaCheckpoint,
    calibration: CalibrationFile,
    tmp_path: Path,
    cli: Cli,
) -> None:
    """By the command that the runtime names when it refuses the LoRA."""
    manifest, error = Manifest.load(bundle), refused(bundle, lora)
    scheme, words = manifest.options.scheme("denoiser"), manifest.options.quantize_method
    assert re.fullmatch(rf"transformer_blocks\.0\.attn1\.to_[qkv] in {scheme}", str(error.found))
    assert f"--quantize denoiser={scheme}" in str(error.fix)
    program, *command = shlex.split(str(error.fix))
    assert program == "sana-export"
    command[command.index("-o") + 1] = str(tmp_path / "folded")
    ran = cli(*command, "--graphs", "denoiser", "--calibration", calibration.path)
    assert ran.code == 0, ran.err

    folded, plain = layers(tmp_path / "folded", merged), layers(bundle, merged)
    options = replace(manifest.options, quantize={"denoiser": scheme}, quantize_method=words)
    with WeightFile(tmp_path / "merged") as weights, built("denoiser", merged, options, weights, calibration) as (module, stored):
        assert folded.keys() == stored.keys()
        for name, place in stored.items():
            numbers, tensors = folded[name]
            wanted = module.get_parameter(name).data
            assert share_of_others(numbers, wanted) < 1e-3, name
            assert share_of_others(plain[name][0], wanted) > 0.1, name
            for end, values in tensors.items():
                where, _ = place.tensors[end]
                assert share_of_others(values, weights.read(where, torch.float32)) < 1e-3, (name, end)
