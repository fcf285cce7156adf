"""The names under which a server without a password answers: none that a foreign web page could have pointed at it."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

#: The names of this machine itself.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_own_host(host: str, names: Collection[str]) -> bool:
    """Whether a header `Host` leads here: it has an IP address, or one of `names`, which are in lower case.

    Whoever owns any other name can point it at this machine, and then the pages under it can read our answers (DNS rebinding).
    """
    name = _name(host)
    return name in names or is_address(name)


def is_address(name: str) -> bool:
    """Whether `name` is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name(host: str) -> str:
    """The name in a header Host, in lower case: of "localhost:8000" it is "localhost"."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
