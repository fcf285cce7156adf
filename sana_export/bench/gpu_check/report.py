"""The report of a run: a JSON document and a Markdown page, written again after each part."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import FAILED
from sana_export.bench.gpu_check.parts import MODELS, PARTS, QUANTIZED_BACKEND, TIMED_SCHEMES
from sana_export.bench.gpu_check.privacy import Redaction
from sana_export.bench.gpu_check.runner import Outcome
from sana_export.errors import DependencyError, ParityError
from sana_export.files import write_whole

SCHEMA_VERSION = 1
#: Column of the table of settings to its key in a row.
_SETTING_COLUMNS = {
    "loading and first call": "first_ms",
    "text encoder": "text_encoder",
    "context": "context",
    "decoder": "vae_decoder",
    "text encoder, new lengths": "new_length",
    "the longest": "longest_new_length",
}
#: The end of a GPU's entry: its driver's version (`machine.gpu_names`).
_DRIVER = re.compile(r", ([\d.]+)$")
#: Backend of a latency part (the end of its name) to its label in the table.
BACKENDS = {
    "eager": "diffusers, eager",
    "compile": "diffusers, torch.compile",
    "torch": "ours: torch, one CUDA graph",
    "torch-compile": "ours: torch.compile, one CUDA graph",
    "onnxruntime": "ours: ONNX Runtime CUDA",
    "onnxruntime-cuda-graphs": "ours: ONNX Runtime CUDA, CUDA graphs",
    "onnxruntime-tensorrt-rtx": "ours: ONNX Runtime TensorRT-RTX",
    "tensorrt-rtx": "ours: TensorRT-RTX",
    "tensorrt": "ours: TensorRT",
}
#: The same for the parts with quantized bundles, whose names have a scheme at the end.
LABELS = {**BACKENDS, **{f"{QUANTIZED_BACKEND}/{scheme}": f"{BACKENDS[QUANTIZED_BACKEND]}, `{scheme}`" for scheme in TIMED_SCHEMES}}


@dataclass
class Report:
    """The report of one run."""

    #: Date and time of the start, in ISO format.
    created: str
    #: The machine (`machine.describe_machine`).
    machine: Mapping[str, Any]
    #: Package to version.
    versions: Mapping[str, str]
    #: "cuda" or "cpu".
    device: str
    #: Time limit of the whole run in seconds.
    limit_seconds: float
    #: What was installed for the run (tools/gpu_check.py).
    setup: Mapping[str, Any] = field(default_factory=dict)
    #: Names of all parts in their order.
    planned: tuple[str, ...] = tuple(part.name for part in PARTS)
    #: Seconds since the start.
    seconds: float = 0.0
    #: Part to its outcome.
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def found(self) -> Mapping[str, Any]:
        """What the part `find` found."""
        return self.outcomes["find"].found if "find" in self.outcomes else {}

    @property
    def has_gpu(self) -> bool:
        return self.found.get("compute_capability") is not None

    @property
    def exit_code(self) -> int:
        """5 if a check failed, else 3 without a GPU, else 0."""
        if any(outcome.status == FAILED for outcome in self.outcomes.values()):
            return ParityError.exit_code
        return 0 if self.has_gpu else DependencyError.exit_code

    def as_json(self) -> dict[str, Any]:
        parts = {name: asdict(self.outcomes[name]) if name in self.outcomes else None for name in self.planned}
        head = ("created", "device", "limit_seconds", "seconds", "exit_code", "machine", "versions", "setup")
        return {"schema_version": SCHEMA_VERSION, **{key: getattr(self, key) for key in head}, "parts": parts}

    def as_text(self) -> str:
        """The page: the machine, latency, parity, TensorRT-RTX's answers, and all parts with their reasons."""
        sections = (
            self._head(),
            self._latency(),
            self._parity(),
            self._judge(),
            self._questions(),
            self._settings(),
            self._parts(),
        )
        return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section))) + "\n"

    def redacted(self, redaction: Redaction) -> Report:
        """This report without what `redaction` takes out."""
        outcomes = {name: Outcome(**redaction.apply(asdict(outcome))) for name, outcome in self.outcomes.items()}
        about = {key: redaction.apply(getattr(self, key)) for key in ("machine", "versions", "setup")}
        return replace(self, outcomes=outcomes, **about)

    def write(self, path: Path, redaction: Redaction) -> None:
        """Write `path` (.json) and the page beside it, each whole or not at all, without what `redaction` takes out."""
        path.parent.mkdir(parents=True, exist_ok=True)
        public = self.redacted(redaction)
        write_whole(path, json.dumps(public.as_json(), indent=1, ensure_ascii=False) + "\n")
        write_whole(path.with_suffix(".md"), public.as_text())

    def _head(self) -> Iterator[str]:
        machine, capability = self.machine, self.found.get("compute_capability")
        gpus = ", ".join(_DRIVER.sub(r", driver \1", gpu) for gpu in self.found.get("gpus", ())) or "an NVIDIA GPU"
        yield "# gpu-check"
        yield ""
        yield (
            f"{gpus}, compute capability {capability}."
            if capability
            else "**No GPU: there is no NVIDIA driver, or the driver reports no GPU.**"
        )
        memory = f"{machine['memory'] / 2**30:.0f} GiB"
        yield f"{machine['cpu']}, {machine['cores']} cores, {memory}; {machine['os']}; Python {machine['python']};"
        yield f"{self.created}; {self.seconds:.0f} s of {self.limit_seconds:.0f} s."
        for state in self.found.get("gpu_state", ()):
            yield "; ".join(f"{key} {value}" for key, value in state.items())
        if backends := self.found.get("backends"):
            yield f"Backends for this GPU: {', '.join(backends)}."
        yield ""
        yield from _table(("module", "version", "more"), map(_module_row, self.found.get("modules", {}).items()))
        if notes := self.setup.get("notes"):
            yield ""
            yield from (f"- {note}" for note in notes)

    def _latency(self) -> Iterator[str]:
        rows = [row for model in MODELS for row in self._latency_rows(model)]
        if rows:
            yield "## Latency"
            yield ""
            yield "1024x1024, 20 steps, guidance 4.5, fp16, synthetic weights, text encoder with one layer. Medians in ms."
            yield "Speedup: eager's loop time divided by this one's; the two are timed one after the other. dB: PSNR against eager."
            yield "SM MHz and W are medians while the counted calls ran. Slowed by: why the GPU lowered its clocks meanwhile."
            yield ""
            head = (
                "model",
                "batch",
                "backend",
                "loop",
                "p10 to p90",
                "decoder",
                "whole call",
                "first call",
                "GiB",
                "SM MHz",
                "W",
                "slowed by",
                "speedup",
                "dB",
            )
            yield from _table(head, rows)

    def _latency_rows(self, model: str) -> Iterator[tuple[object, ...]]:
        found = {name: self._found(f"latency/{model}/{name}").get("rows", {}) for name in LABELS}
        for batch in sorted({batch for rows in found.values() for batch in rows}, key=int):
            eager = found["eager"].get(batch)
            for name, rows in found.items():
                if row := rows.get(batch):
                    loop = row["denoise_loop"]
                    ratio = f"{eager['denoise_loop']['median'] / loop['median']:.2f}" if eager else ""
                    db = "" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
                    stages = (_ms(row["vae_decoder"]), _ms(row["end_to_end"]), f"{row['first_ms']:.0f}")
                    memory = f"{row['peak_device_bytes'] / 2**30:.1f}" if row["peak_device_bytes"] else ""
                    spread = f"{loop['p10']:.1f} to {loop['p90']:.1f}"
                    gpu = row.get("gpu") or {}
                    slowed_by = ", ".join(gpu.get("slowed_by", ()))
                    state = (_median(gpu.get("sm_clock_mhz")), _median(gpu.get("power_w")), slowed_by)
                    yield model, batch, LABELS[name], _ms(loop), spread, *stages, memory, *state, ratio, db

    def _parity(self) -> Iterator[str]:
        rows = [
            (name.removeprefix("parity/"), case, f"{row['least_cosine']:.7f}", f"{row['least_image_psnr_db']:.1f}", row["passed"])
            for name in self.planned
            if name.startswith("parity/")
            for case, row in self._found(name).get("cases", {}).items()
        ]
        if rows:
            yield "## Parity with diffusers in fp32"
            yield ""
            yield from _table(("backend", "bundle", "lowest cosine of a graph", "lowest dB of an image", "passed"), rows)

    def _judge(self) -> Iterator[str]:
        rows = [
            (name.removeprefix("judge/"), case, graph, *("" if ratio is None else f"{ratio:.1f}" for ratio in row.values()))
            for name in self.planned
            if name.startswith("judge/")
            for case, graphs in self._found(name).get("cases", {}).items()
            for graph, row in graphs.items()
        ]
        if rows:
            yield "## Engines judged by Polygraphy: dB to ONNX Runtime on the CPU"
            yield ""
            yield from _table(("backend", "bundle", "graph", "run by Polygraphy", "run by us"), rows)

    def _questions(self) -> Iterator[str]:
        names = [name for name in self.planned if name.startswith("rtx/") and self._found(name)]
        if names:
            yield f"## Does TensorRT-RTX run on compute capability {self.found.get('compute_capability')}?"
            yield ""
            keys = ("built", "loaded", "ran")
            rows = []
            for name in names:
                found = self._found(name)
                answers = (_yes(found[key]) for key in keys)
                rows.append((name.removeprefix("rtx/"), *answers, found.get("cosine", ""), "; ".join(found["said"])))
            yield from _table(("engine", *keys, "cosine", "messages"), rows)

    def _settings(self) -> Iterator[str]:
        rows = [
            (
                name.removeprefix("settings/"),
                setting,
                *(f"{row[key]:.1f}" for key in _SETTING_COLUMNS.values()),
                f"{row['cache_bytes'] / 2**20:.1f}",
            )
            for name in self.planned
            if name.startswith("settings/")
            for setting, row in self._found(name).get("rows", {}).items()
        ]
        if rows:
            yield "## Settings of the engine backends"
            yield ""
            yield "Two blocks of 1600M, one layer of the text encoder, a small decoder. Medians in ms; new lengths: prompts of"
            yield "lengths that were not seen before."
            yield ""
            yield from _table(("backend", "setting", *_SETTING_COLUMNS, "cache MiB"), rows)

    def _parts(self) -> Iterator[str]:
        yield "## Parts"
        yield ""
        counts = Counter(outcome.status for outcome in self.outcomes.values())
        yield ", ".join(f"{count} {status}" for status, count in counts.items()) + "."
        if others := [part.name for part in PARTS if part.name not in self.planned]:
            yield f"Not chosen for this run: {', '.join(others)}."
        yield ""
        rows = [
            (name, outcome.status, f"{outcome.seconds:.0f}", outcome.reason or "")
            if (outcome := self.outcomes.get(name))
            else (name, "not reached", "", "")
            for name in self.planned
        ]
        yield from _table(("part", "outcome", "s", "reason"), rows)

    def _found(self, name: str) -> Mapping[str, Any]:
        return self.outcomes[name].found if name in self.outcomes else {}


def _module_row(entry: tuple[str, Mapping[str, Any]]) -> tuple[str, str, str]:
    name, answer = entry
    more = {key: value for key, value in answer.items() if key not in ("version", "error") and value is not None}
    text = ", ".join(f"{key} {value}" for key, value in more.items())
    return name, answer.get("version", "does not load"), answer.get("error", text)


def _table(head: tuple[str, ...], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(' '.join(str(cell).split()).replace('|', '/')[:400] for cell in row)} |"


def _median(values: Mapping[str, float] | None) -> str:
    return "" if values is None else f"{values['median']:.0f}"


def _ms(summary: Mapping[str, float] | None) -> str:
    return "" if summary is None else f"{summary['median']:.1f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
