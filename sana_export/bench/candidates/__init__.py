"""The backends that a benchmark compares, each in a process of its own."""

from sana_export.bench.candidates.table import Candidate, Generated, Job

__all__ = ["Candidate", "Generated", "Job"]
