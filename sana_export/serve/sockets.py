"""The socket that a server or a page listens on."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from sana_export.errors import DependencyError

#: Connections that the system keeps until they are accepted; all of them may be accepted at once, beyond the limit.
BACKLOG = 256


@contextlib.contextmanager
def listening(what: str, host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, for `what`. Raises DependencyError if the address cannot be used."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise DependencyError(
            f"the {what} cannot listen on {host}, port {port}",
            found=str(error),
            wanted="an address of this machine, and a port that no other program uses",
            fix=f"--port {port + 1 if port < 65535 else 0}",
        ) from error
    with listener:
        yield listener
