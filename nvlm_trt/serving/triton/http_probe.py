"""Asks tritonserver's HTTP endpoints. http.client ignores the environment's proxy, which may not reach this machine."""

from __future__ import annotations

import http.client

_SECONDS = 5


def get(host: str, port: int, path: str) -> str | None:
    """Return the body of a successful answer, else None."""
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        return _ask(connection, path)
    finally:
        connection.close()


def keep_open(host: str, port: int) -> http.client.HTTPConnection | None:
    """Open a connection that the server has accepted, None if it accepts none."""
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    if _ask(connection, "/v2/health/live") is not None:
        return connection
    connection.close()
    return None


def _ask(connection: http.client.HTTPConnection, path: str) -> str | None:
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
        return body if response.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
