"""Quantized bundles on a CPU: eager diffusers, torch.compile, our runtime on each bundle, and OpenVINO, in turns in one process.

python benchmarks/quantized_cpu.py mid --bundle fp32=B --bundle int8=Q -o benchmarks/out/mid-cpu-quantized

The first bundle is also what OpenVINO runs: as it is, and with the denoiser and the decoder quantized by NNCF, OpenVINO's own
tool, if that is installed (pip install openvino nncf). Times are seconds of this process's own CPU time, so that other programs on
the machine count less. They are on one thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import STAGES, WORDS, draw_with_diffusers, draw_with_runtime, random_prompt, request_words
from PIL import Image

from sana_export import SanaRuntime, open_checkpoint
from sana_export.bench.candidates.openvino import OpenVinoBackend
from sana_export.bench.load_meter import LoadMeter
from sana_export.errors import SanaExportError
from sana_export.export.parity import psnr
from sana_export.machine import describe_machine, describe_versions
from sana_export.manifest import Manifest
from sana_export.quantization.choice import quantization_words
from sana_export.runtime.backends.base import BackendSettings, Session
from sana_export.verify.reference import load_reference

#: The graphs that NNCF quantizes, and what it leaves: all others together take less than 2% of a call. OpenVINO 2026.4 compiles no
#: quantized product whose weight is the left factor, as the decoder's are (`any_of(scale.size(), OC, 1U)`).
QUANTIZED: dict[str, list[str]] = {"denoiser": [], "vae_decoder": ["MatMul"]}
#: Draws the image of a prompt and a seed. Returns it with the CPU seconds of each stage.
Draw = Callable[[str, int], tuple[Image.Image, dict[str, float]]]
THREADS = BackendSettings(threads=1)


class Recording(Session):
    """A session that keeps what it is fed."""

    def __init__(self, session: Session, kept: list[Any]) -> None:
        self.session, self.kept = session, kept

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.kept.append({name: np.array(value) for name, value in feeds.items()})
        return self.session.run(feeds)


class RecordingBackend(OpenVinoBackend):
    """Keeps the inputs of the graphs in `QUANTIZED`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: dict[str, list[Any]] = {name: [] for name in QUANTIZED}

    def load(self, graph: str) -> Any:
        session = super().load(graph)
        return Recording(session, self.kept[graph]) if graph in self.kept else session


def quantize_with_nncf(bundle: Path, folder: Path, draw: Callable[[SanaRuntime], None]) -> dict[str, Path]:
    """OpenVINO models of the graphs in `QUANTIZED`, quantized with the inputs of what `draw` draws, with NNCF's defaults."""
    import nncf
    import openvino

    found, backends = {}, []

    def load(path: Path, manifest: Manifest) -> RecordingBackend:
        backends.append(RecordingBackend(path, manifest, THREADS))
        return backends[0]

    with SanaRuntime.from_pretrained(bundle, backend=load) as runtime:
        draw(runtime)
        for graph, samples in backends[0].kept.items():
            model = openvino.Core().read_model(bundle / runtime.manifest.graphs[graph].files[0].path)
            kind = nncf.ModelType.TRANSFORMER if graph == "denoiser" else None
            left = nncf.IgnoredScope(types=QUANTIZED[graph])
            data = nncf.Dataset(samples)
            quantized = nncf.quantize(model, data, subset_size=len(samples), model_type=kind, ignored_scope=left)
            found[graph] = folder / f"{graph}.xml"
            openvino.save_model(quantized, found[graph], compress_to_fp16=False)
    return found


def subjects(args: argparse.Namespace, words: dict[str, Any], stack: contextlib.ExitStack) -> dict[str, Draw]:
    """What is compared, by name."""

    def ours(bundle: Path, backend: Any, **settings: Any) -> Draw:
        runtime = SanaRuntime.from_pretrained(bundle, backend=backend, prompt_cache_bytes=0, **settings)
        stack.enter_context(runtime)
        return lambda prompt, seed: draw_with_runtime(runtime, prompt, seed, words)

    def diffusers(compiled: bool) -> Draw:
        pipe = load_reference(open_checkpoint(args.checkpoint), Manifest.load(first).options, pag=False)
        if compiled:
            pipe.transformer.forward = torch.compile(pipe.transformer.forward)
            pipe.vae.decoder.forward = torch.compile(pipe.vae.decoder.forward)
        return lambda prompt, seed: draw_with_diffusers(pipe, prompt, seed, words)

    def openvino(**replaced: Path) -> Draw:
        return ours(first, lambda bundle, manifest: OpenVinoBackend(bundle, manifest, THREADS, replaced=replaced))

    def calibrate(runtime: SanaRuntime) -> None:
        for seed in range(args.calibration):
            draw_with_runtime(runtime, f"{WORDS[seed % len(WORDS)]}, {WORDS[-1 - seed % len(WORDS)]}", 1000 + seed, words)

    bundles = dict(args.bundle)
    first = next(iter(bundles.values()))
    found = {"eager": diffusers(False)}
    if not args.no_compile:
        found["torch.compile"] = diffusers(True)
    found |= {f"ours, {name}": ours(path, "onnxruntime", threads=1) for name, path in bundles.items()}
    if not args.no_openvino:
        found["OpenVINO, fp32"] = openvino()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found["OpenVINO, INT8 by NNCF"] = openvino(**quantize_with_nncf(first, folder, calibrate))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="what the bundles were exported from")
    parser.add_argument("--bundle", type=_named, action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("-o", "--output", type=Path, required=True, help="two files, with .json and .md added")
    parser.add_argument("--size", type=int, default=512, help="pixels of the image's side")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--calibration", type=int, default=4, help="images that NNCF calibrates with")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-openvino", action="store_true")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)
    words = request_words(args.size, args.steps)
    rng, times, likeness = np.random.default_rng(0), dict[str, list[Any]](), dict[str, list[float]]()
    with contextlib.ExitStack() as stack:
        drawing = subjects(args, words, stack)
        meter = LoadMeter(lambda: 0.0)
        for number in range(args.rounds + 1):
            prompt, images = random_prompt(rng), dict[str, Any]()
            for name, draw in drawing.items():
                image, seconds = draw(prompt, number)
                images[name] = np.asarray(image)
                if number:
                    times.setdefault(name, []).append(seconds)
                    likeness.setdefault(name, []).append(psnr(images[name], images["eager"], peak=255.0))
            shown = (f"{name} {all_[-1]['whole']:.1f} s" for name, all_ in times.items())
            print(f"round {number}: {', '.join(shown)}", flush=True)
            if number:  # the report is complete after each round, and the next one adds to it
                write(args, number, words, times, likeness, meter.other_load())
    print(args.output.with_suffix(".md").read_text("utf-8"))


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("wanted NAME=PATH")
    return name, Path(path)


def write(
    args: argparse.Namespace,
    rounds: int,
    words: dict[str, Any],
    times: dict[str, Any],
    likeness: dict[str, Any],
    load: float | None,
) -> None:
    """Write the report of so many rounds as JSON and as a page."""
    middle = {name: {stage: statistics.median(own[stage] for own in all_) for stage in STAGES} for name, all_ in times.items()}
    machine, versions = describe_machine(), describe_versions()
    for package in ("openvino", "nncf"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    bundles = {name: quantization_words(Manifest.load(path).options.quantize) or "nothing" for name, path in args.bundle}
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
        "checkpoint": args.checkpoint,
        "quantized": bundles,
        "words": words,
        "threads": 1,
        "rounds": rounds,
        "calibration": args.calibration,
        "clock": "CPU seconds of the process",
        "other_load": load,
        "seconds": times,
        "median": middle,
        "psnr_to_eager": likeness,
    }
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# Quantized on a CPU: {args.checkpoint}, {args.size} px, {args.steps} steps",
        "",
        f"Medians of {rounds} rounds after one that does not count, in turns in one process, a new prompt and seed each.",
        f"CPU seconds of the process, one thread each. {machine['cpu']}; other programs took"
        f" {'an unknown share' if load is None else f'{load:.0%}'} of the machine meanwhile. All versions are in the JSON file.",
        "",
        "| | prompts | steps | decoder | whole call | times as fast as fp32: steps | decoder | whole call |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(name, times, middle, f"ours, {args.bundle[0][0]}") for name in times),
        "",
        "Ratios are medians of the ratios round by round. Quantized: "
        + "; ".join(f"{name}: {what}" for name, what in bundles.items())
        + ".",
        "PSNR of the images against eager's, at least: "
        + ", ".join(f"{name} {min(values):.1f} dB" for name, values in likeness.items() if name != "eager")
        + ".",
    ]
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, times: dict[str, Any], middle: dict[str, Any], base: str) -> str:
    """One line of the table."""
    ratios = (statistics.median(b[stage] / a[stage] for a, b in zip(times[name], times[base], strict=True)) for stage in STAGES[1:])
    cells = [*(f"{middle[name][stage]:.2f}" for stage in STAGES), *(f"{ratio:.2f}" for ratio in ratios)]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        main()
    except SanaExportError as error:
        sys.exit(str(error))
