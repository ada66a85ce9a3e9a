"""Where to listen: a host's address, a free port where 0 is asked for, an error that names a port that is taken."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable

from nvlm_trt.errors import ServerError


def listen_address(host: str) -> str:
    """The IPv4 address of `host`: tritonserver takes names for gRPC but not for HTTP, and IPv6 for neither.

    Raises ServerError if there is none.
    """
    try:
        (_, _, _, _, address), *_ = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ServerError(f"cannot listen on host {host!r}: it has no IPv4 address; choose another --host") from None
    return str(address[0])


def choose_ports(address: str, ports: Iterable[int]) -> list[int]:
    """`ports` with every 0 replaced by a free port. Raises ServerError for one in use and for an address not of ours.

    All are held until the last is found, so that they differ. Somebody else may take one before the server does: a
    caller that asked for 0 tries again.
    """
    with contextlib.ExitStack() as held:
        return [held.enter_context(_bound(address, port)).getsockname()[1] for port in ports]


def _bound(address: str, port: int) -> socket.socket:
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
    return ServerError(f"port {port} of {address} is in use; choose another port, or 0 for a free one")
