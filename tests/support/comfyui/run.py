"""What a run of a workflow does, the same for the stand-in and for the real engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

#: A workflow in the API's format: nodes by id.
Workflow = dict[str, dict[str, Any]]


@dataclass
class Run:
    """What one run showed to the user."""

    #: "success", "error", "interrupted", or "refused" if it was not started.
    status: str = "success"
    #: The nodes that ran, in order; the others were cached.
    executed: list[str] = field(default_factory=list)
    #: (node, value, total) of each update of a progress bar.
    progress: list[tuple[str, int, int]] = field(default_factory=list)
    #: The previews of the progress bars: format, image, largest side.
    previews: list[tuple[str, Any, int]] = field(default_factory=list)
    #: The message of an error and the node that it is shown at.
    message: str = ""
    node: str = ""
    #: The images that SaveImage wrote: uint8 [H, W, 3].
    images: list[npt.NDArray[np.uint8]] = field(default_factory=list)


class Engine(Protocol):
    """A ComfyUI that has loaded our pack."""

    #: Whether it is the real one.
    real: bool
    #: The nodes by name.
    nodes: dict[str, Any]

    def run(self, workflow: Workflow, *, interrupt_at: tuple[str, int] | None = None) -> Run:
        """Run a workflow. `interrupt_at`: the user interrupts it when this node's progress has this value."""

    def interrupt(self) -> None:
        """As the button that stops a run."""

    def show_previews(self, shown: bool) -> None:
        """As --preview-method auto, or none."""

    def unload_models(self) -> None:
        """As the button "Unload Models"."""
