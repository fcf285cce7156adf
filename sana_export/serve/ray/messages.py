"""What a drawing replica yields besides the events of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Failed:
    """The job failed in the replica, which is fine. Always the last item.

    Sent rather than raised: Ray logs what is raised with a traceback, and wraps it in a class of its own.
    """

    error: Exception


@dataclass(frozen=True)
class ReplicaReport:
    """The state of a replica when it has drawn a job."""

    #: The models that are in its memory.
    loaded: frozenset[str]
    #: Bytes of memory, (used, total), of the replica's GPUs: by the address of its machine and the index there.
    gpu_memory: Mapping[str, tuple[int, int]]
