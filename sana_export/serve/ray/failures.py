"""What Ray raises in place of a replica's answer, and what it means for a job."""

from __future__ import annotations

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from sana_export.errors import first_line
from sana_export.serve.errors import Refusal

#: The replica died, its machine did, or the connection to it broke. Ray cancels what a replica still draws when its time to drain
#: is over.
LOST = (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    ReplicaUnavailableError,
    TaskCancelledError,
    WorkerCrashedError,
)


class ReplicaLost(Exception):
    """The replica that draws a job died, or cannot be reached."""


def meaning(error: Exception) -> Exception:
    """ReplicaLost if the job can be sent again, a Refusal for the client, or else the error itself."""
    if isinstance(error, LOST):
        return ReplicaLost(f"the replica is gone: {first_line(error)}")
    if isinstance(error, BackPressureError):
        return Refusal("queue_full", "the queue is full; try again later")
    if isinstance(error, DeploymentUnavailableError):
        return Refusal("not_ready", "no replica that draws can be started; the server's log says more")
    return error
