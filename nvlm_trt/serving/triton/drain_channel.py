"""Tells the model `nvlm` to drain, over a socket that its process inherits: nobody can delete that, unlike a file."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

# the messages, a byte each; `nvlm` answers with the last two, in this order
DRAIN = b"d"
ENCODED = b"e"  # no open request has an image that is still to be encoded
IDLE = b"i"  # no request is open

_POLL_SECONDS = 0.1


class DrainChannel:
    """The supervisor's end. `descriptor` is the model's, to be inherited by tritonserver and so by its models."""

    def __init__(self) -> None:
        self._socket, self._inherited = socket.socketpair()
        self._socket.settimeout(_POLL_SECONDS)

    @property
    def descriptor(self) -> int:
        return self._inherited.fileno()

    def close_inherited(self) -> None:
        """Close this process's copy of the model's end, once the server has its own."""
        self._inherited.close()

    def tell(self) -> None:
        """Tell the model to refuse new requests. Does nothing if its process has ended."""
        with contextlib.suppress(OSError):
            self._socket.send(DRAIN)

    def wait_for(self, message: bytes, give_up: Callable[[], bool]) -> bool:
        """Wait for an answer of the model. Return False if `give_up` does meanwhile, or if all processes that hold the
        model's end have ended."""
        while True:
            try:
                received = self._socket.recv(1)
            except TimeoutError:
                if give_up():
                    return False
                continue
            except OSError:
                return False
            if received in (message, b""):
                return received == message

    def close(self) -> None:
        self._socket.close()
        self._inherited.close()
