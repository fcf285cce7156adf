"""The report of a run as one JSON document and one Markdown page, rewritten after every part."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sana_export.bench.gpu_check.check import FAILED
from sana_export.bench.gpu_check.parts import MODELS, PARTS
from sana_export.bench.gpu_check.runner import Outcome
from sana_export.errors import DependencyError, ParityError

SCHEMA_VERSION = 1
#: The last part of a name of latency parts: what it is called in the table.
BACKENDS = {
    "eager": "diffusers, eager",
    "compile": "diffusers, torch.compile",
    "torch": "ours: torch, one CUDA graph",
    "torch-compile": "ours: torch.compile, one CUDA graph",
    "onnxruntime": "ours: ONNX Runtime CUDA",
    "onnxruntime-cuda-graphs": "ours: ONNX Runtime CUDA, CUDA graphs",
    "tensorrt-rtx": "ours: TensorRT-RTX",
    "tensorrt": "ours: TensorRT",
}


@dataclass
class Report:
    """All of one run. `setup`: what was installed for it. `planned`: the parts that it is made of, in their order."""

    created: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    device: str
    limit_seconds: float
    setup: Mapping[str, Any] = field(default_factory=dict)
    planned: tuple[str, ...] = tuple(part.name for part in PARTS)
    seconds: float = 0.0
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def found(self) -> Mapping[str, Any]:
        """What the first part found here."""
        return self.outcomes["find"].found if "find" in self.outcomes else {}

    @property
    def has_gpu(self) -> bool:
        return self.found.get("compute_capability") is not None

    @property
    def exit_code(self) -> int:
        """5 where a check failed, else 3 without a GPU, else 0."""
        if any(outcome.status == FAILED for outcome in self.outcomes.values()):
            return ParityError.exit_code
        return 0 if self.has_gpu else DependencyError.exit_code

    def as_json(self) -> dict[str, Any]:
        parts = {name: asdict(self.outcomes[name]) if name in self.outcomes else None for name in self.planned}
        head = ("created", "device", "limit_seconds", "seconds", "exit_code", "machine", "versions", "setup")
        return {"schema_version": SCHEMA_VERSION, **{key: getattr(self, key) for key in head}, "parts": parts}

    def as_text(self) -> str:
        """The page: what this machine has, latency, parity, TensorRT-RTX's answers, and every part with its reason."""
        sections = (self._head(), self._latency(), self._parity(), self._questions(), self._parts())
        return "\n\n".join("\n".join(lines) for section in sections if (lines := list(section))) + "\n"

    def write(self, path: Path) -> None:
        """Write `path` (.json) and the page beside it, each under a temporary name first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.as_json(), indent=1, ensure_ascii=False, default=str) + "\n"
        for target, text in ((path, content), (path.with_suffix(".md"), self.as_text())):
            partial = target.with_name(f"{target.name}.tmp")
            partial.write_text(text, "utf-8")
            partial.replace(target)

    def _head(self) -> Iterator[str]:
        machine, capability = self.machine, self.found.get("compute_capability")
        gpus = ", ".join(self.found.get("gpus", ())) or "an NVIDIA GPU"
        yield "# gpu-check"
        yield ""
        yield f"{gpus}, compute capability {capability}." if capability else "**No GPU: no NVIDIA driver answers, or it has none.**"
        yield f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB; {machine['os']}; Python"
        yield f"{machine['python']}; {self.created}; {self.seconds:.0f} s of {self.limit_seconds:.0f} s."
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
            yield "1024x1024, 20 steps, guidance 4.5, fp16, synthetic weights, one layer of text encoder. Medians in ms. Times"
            yield "eager: its loop by this one, measured one after the other. dB: the picture against eager's."
            yield ""
            head = (
                "model",
                "batch",
                "what",
                "loop",
                "p10 to p90",
                "decoder",
                "whole call",
                "first call",
                "GiB",
                "times eager",
                "dB",
            )
            yield from _table(head, rows)

    def _latency_rows(self, model: str) -> Iterator[tuple[object, ...]]:
        found = {name: self._found(f"latency/{model}/{name}").get("rows", {}) for name in BACKENDS}
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
                    yield model, batch, BACKENDS[name], _ms(loop), spread, *stages, memory, ratio, db

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
            yield from _table(("backend", "bundle", "least cosine of a graph", "least dB of a picture", "passed"), rows)

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
            yield from _table(("engine", *keys, "cosine", "what it says"), rows)

    def _parts(self) -> Iterator[str]:
        yield "## Parts"
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
    more = {key: value for key, value in answer.items() if key not in ("version", "error")}
    text = ", ".join(f"{key} {value}" for key, value in more.items())
    return name, answer.get("version", "does not load"), answer.get("error", text)


def _table(head: tuple[str, ...], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(' '.join(str(cell).split()).replace('|', '/')[:400] for cell in row)} |"


def _ms(summary: Mapping[str, float] | None) -> str:
    return "" if summary is None else f"{summary['median']:.1f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
