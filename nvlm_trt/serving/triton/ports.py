"""Chooses where to listen: resolves the host, replaces port 0 by a free port, names a port that is in use."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable

from nvlm_trt.errors import ServerError


def listen_address(host: str) -> str:
    """Returns the IPv4 address of `host`: tritonserver takes names for gRPC but not for HTTP, and IPv6 for neither.

    Raises ServerError if the host has none.
    """
    try:
        (_, _, _, _, address), *_ = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ServerError(f"cannot listen on host {host!r}: it has no IPv4 address; choose another --host") from None
    return str(address[0])


def choose_ports(address: str, ports: Iterable[int]) -> list[int]:
    """Returns `ports` with every 0 replaced by a free port.

    Holds all ports until the last is found, so that they differ. Another program may take a free port before the server
    does: a caller that asked for 0 tries again. Raises ServerError if a port is in use or the address is not of this
    machine.
    """
    with contextlib.ExitStack() as held:
        return [held.enter_context(bind_port(address, port)).getsockname()[1] for port in ports]


def bind_port(address: str, port: int) -> socket.socket:
    """Listens on a port, 0 for a free one. Raises ServerError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()  # SO_REUSEADDR lets two sockets bind one port; only one may listen
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise port_in_use(address, port) from None
        raise ServerError(
            f"cannot listen on {address}:{port} ({error.strerror}); choose another host or port"
        ) from None
    return listener


def port_in_use(address: str, port: int) -> ServerError:
    """The error for a port that another program listens on."""
    return ServerError(f"port {port} of {address} is in use; choose another port, or 0 for a free one")
