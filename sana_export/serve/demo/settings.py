"""What the demo page shows and where, and how much one image may ask for."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from sana_export.adapters import Lora
from sana_export.runtime.memory import AUTO

LOOPBACK = "127.0.0.1"
PORT = 7860


@dataclass(frozen=True)
class DemoLimits:
    """The most that one image may ask for, and how many may wait."""

    #: Characters of a prompt.
    prompt_characters: int = 4000
    #: Sampling steps.
    steps: int = 100
    #: Pixels of the image's side, as a multiple of the native size.
    native_sizes: float = 2.0
    #: Images that wait for their turn. A browser that asks for one more is told that the queue is full.
    waiting: int = 16


@dataclass(frozen=True)
class DemoSettings:
    """One demo page."""

    #: Folder of the bundle.
    bundle: Path
    #: The address that the page binds to.
    host: str = LOOPBACK
    #: The port. 0: any free one.
    port: int = PORT
    #: The LoRAs that a visitor may choose.
    loras: tuple[Lora, ...] = ()
    #: The backend that the page starts with.
    backend: str = AUTO
    #: The parameters of `SanaRuntime.from_pretrained`.
    memory: str = AUTO
    device: int | None = None
    threads: int | None = None
    limits: DemoLimits = field(default_factory=DemoLimits)

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the page."""
        return self.host == "localhost" or _is_loopback(self.host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False
