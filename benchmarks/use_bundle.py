"""What use_bundle costs: eager diffusers, the same pipeline with a bundle, and our runtime, in turns in one process on the CPU.

python benchmarks/use_bundle.py engines/out/mid mid -o benchmarks/results/mid-cpu-use-bundle

Times are seconds of this process's own CPU time, so that other programs on the machine count less. They are on one thread each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import STAGES, draw_with_diffusers, draw_with_runtime, random_prompt, request_words

from sana_export import SanaRuntime, open_checkpoint
from sana_export.bench.load_meter import LoadMeter
from sana_export.errors import SanaExportError
from sana_export.integrations.diffusers import use_bundle
from sana_export.machine import describe_machine, describe_versions
from sana_export.verify.reference import load_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", help="what the bundle was exported from")
    parser.add_argument("-o", "--output", type=Path, required=True, help="two files, with .json and .md added")
    parser.add_argument("--size", type=int, default=512, help="pixels of the image's side")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    args = parser.parse_args()

    torch.set_num_threads(1)
    words = request_words(args.size, args.steps)
    rng = np.random.default_rng(0)
    times: dict[str, list[dict[str, float]]] = {"eager": [], "use_bundle": [], "runtime": []}
    identical: dict[str, list[float]] = {"use_bundle": [], "runtime": []}
    meter = LoadMeter(lambda: 0.0)
    with SanaRuntime.from_pretrained(args.bundle, backend="onnxruntime", threads=1, prompt_cache_bytes=0) as runtime:
        pipe = load_reference(open_checkpoint(args.checkpoint), runtime.manifest.options, pag=False)
        for number in range(args.rounds + 1):
            prompt, images = random_prompt(rng), {}
            for name in times:
                if name == "runtime":
                    images[name], seconds = draw_with_runtime(runtime, prompt, number, words)
                elif name == "use_bundle":
                    with use_bundle(pipe, runtime):
                        images[name], seconds = draw_with_diffusers(pipe, prompt, number, words)
                else:
                    images[name], seconds = draw_with_diffusers(pipe, prompt, number, words)
                if number:
                    times[name].append(seconds)
            for name, shares in identical.items():
                shares.append(float((np.asarray(images[name]) == np.asarray(images["eager"])).mean()))
            shown = (f"{name} {all_[-1]['whole']:.1f} s" for name, all_ in times.items() if all_)
            print(f"round {number}: {', '.join(shown)}", flush=True)
    write(args, words, times, identical, meter.other_load())


def write(
    args: argparse.Namespace, words: dict[str, Any], times: dict[str, Any], identical: dict[str, Any], load: float | None
) -> None:
    """Write the report as JSON and as a page."""
    middle = {name: {stage: statistics.median(own[stage] for own in all_) for stage in STAGES} for name, all_ in times.items()}
    ratios = {
        f"{name} / {base}": statistics.median(a["whole"] / b["whole"] for a, b in zip(times[name], times[base], strict=True))
        for name, base in (("use_bundle", "eager"), ("runtime", "eager"), ("use_bundle", "runtime"))
    }
    machine = describe_machine()
    report = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": describe_versions(),
        "checkpoint": args.checkpoint,
        "words": words,
        "threads": 1,
        "rounds": args.rounds,
        "clock": "CPU seconds of the process",
        "other_load": load,
        "seconds": times,
        "median": middle,
        "median_ratio": ratios,
        "identical_to_eager": identical,
    }
    args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows = [f"| `{name}` | " + " | ".join(f"{own[stage]:.2f}" for stage in STAGES) + " |" for name, own in middle.items()]
    least = {name: f"{100 * min(shares):.3f}%" for name, shares in identical.items()}
    lines = [
        f"# use_bundle: {args.checkpoint}, {args.size} px, {args.steps} steps, on a CPU",
        "",
        f"Medians of {args.rounds} rounds after one that does not count, in turns in one process, each with a new prompt and seed.",
        f"CPU seconds of the process, one thread each. {machine['cpu']}; other programs took"
        f" {'an unknown share' if load is None else f'{load:.0%}'} of the machine meanwhile. All versions are in the JSON file.",
        "",
        "| | prompts | steps | decoder | whole call |",
        "|---|---:|---:|---:|---:|",
        *rows,
        "",
        "Whole calls, median of the ratios round by round: "
        + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
        + ".",
        "Values identical to eager's, at least: " + ", ".join(f"{name} {share}" for name, share in least.items()) + ".",
    ]
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except SanaExportError as error:
        sys.exit(str(error))
