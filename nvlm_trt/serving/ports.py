"""TCP ports to listen on: a free one where 0 is asked for, an error that names the port where one is taken."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable

from nvlm_trt.errors import ServerError


def choose_ports(host: str, ports: Iterable[int]) -> list[int]:
    """`ports` with every 0 replaced by a free port. Raises ServerError for one in use and for a host not of ours.

    All are held until the last is found, so that they differ. Somebody else may take one before the server does: a
    caller that asked for 0 tries again.
    """
    with contextlib.ExitStack() as held:
        return [held.enter_context(_bound(host, port)).getsockname()[1] for port in ports]


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ServerError(f"cannot listen on host {host!r} ({error.strerror}); choose another --host") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # SO_REUSEADDR lets two sockets bind one port; only one may listen
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(host, port) from None
        raise ServerError(f"cannot listen on {host}:{port} ({error.strerror}); choose another host or port") from None
    return listener


def port_in_use(host: str, port: int) -> ServerError:
    return ServerError(f"port {port} of {host} is in use; choose another port, or 0 for a free one")
