"""The results of a verification, as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sana_export.export.evaluator import Range
from sana_export.export.parity import Parity
from sana_export.verify.intervals import IntervalCost
from sana_export.verify.quality.result import Quality


@dataclass(frozen=True)
class VerifyReport:
    """Parity of one bundle with diffusers."""

    #: The bundle's path.
    bundle: str
    #: The checkpoint that it was compared with.
    reference: str
    #: The bundle's precision: fp32, fp16 or bf16.
    precision: str
    #: The backend that ran it.
    backend: str
    #: Where it ran: "cpu" or "cuda".
    device: str
    #: One row for each graph.
    graphs: tuple[Parity, ...]
    #: One row for each sampled prompt. They have no limit, but values that are not finite fail.
    latents: tuple[Parity, ...]
    #: One row for each sampled prompt.
    images: tuple[Parity, ...]
    #: What the images show. None: not measured.
    quality: Quality | None = None
    #: What guidance in an interval of the steps costs. None: not measured.
    intervals: IntervalCost | None = None

    @property
    def passed(self) -> bool:
        """Whether no limit was missed."""
        rows = (*self.graphs, *self.latents, *self.images)
        return all(row.passed for row in rows) and (self.quality is None or self.quality.passed)

    def as_json(self, samples: bool = True) -> dict[str, Any]:
        """`samples`: with a row for each image of `quality`, too."""
        rows = {kind: [row.as_json() for row in getattr(self, kind)] for kind in ("graphs", "latents", "images")}
        head = {key: getattr(self, key) for key in ("bundle", "reference", "precision", "backend", "device", "passed")}
        quality = {} if self.quality is None else {"quality": self.quality.as_json(samples)}
        return {**head, **rows, **quality, **({} if self.intervals is None else {"intervals": self.intervals.as_json()})}

    def as_text(self) -> str:
        rows = [*self.graphs, *self.latents, *self.images]
        width = max(len(row.name) for row in rows)
        lines = [f"{self.bundle} ({self.precision}, {self.backend} on the {self.device}) compared with {self.reference} in fp32"]
        for row in rows:
            mark = "ok    " if row.passed else "MISSED"
            identical = "" if row.identical is None else f"  identical {row.identical:.4%}"
            lines.append(
                f"  {mark} {row.name:{width}}  cosine {row.cosine:.9f}  psnr {row.psnr_db:6.1f} dB  max {row.max_abs:.3g}"
                f"{identical}  (limit: {row.limit})"
            )
        lines += [measured.as_text() for measured in (self.quality, self.intervals) if measured is not None]
        lines.append("passed" if self.passed else "NOT passed")
        return "\n".join(lines)


@dataclass(frozen=True)
class RangeReport:
    """The largest magnitude of every half-precision tensor of a bundle, over some prompts."""

    #: The bundle's path.
    bundle: str
    #: The prompts that were sampled.
    prompts: tuple[str, ...]
    #: One row for each tensor, lowest headroom first.
    rows: tuple[Range, ...]

    def as_json(self) -> dict[str, Any]:
        rows = [{**vars(row), "largest": min(row.largest, 1e39), "headroom": min(row.headroom, 1e39)} for row in self.rows]
        return {"bundle": self.bundle, "prompts": list(self.prompts), "ranges": rows}

    def as_text(self, count: int = 20) -> str:
        """The `count` tensors with the lowest headroom, and how many overflow."""
        lines = [f"{self.bundle}: largest magnitudes over {len(self.prompts)} prompts, lowest headroom first"]
        lines += [
            f"  {row.largest:12.5g}  headroom {row.headroom:10.3g}  {row.graph}: {row.operator} {row.tensor} ({row.dtype})"
            for row in self.rows[:count]
        ]
        overflows = sum(row.headroom < 1 for row in self.rows)
        return "\n".join([*lines, f"{overflows} of {len(self.rows)} tensors exceed the largest number of their dtype"])
