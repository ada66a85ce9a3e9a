"""Reads the bodies of requests: bytes within limits, then JSON, then the fields, with errors that name the fault."""

from __future__ import annotations

import asyncio
import contextlib
import reprlib
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from nvlm_trt import strict_json
from nvlm_trt.serving.gateway.errors import HttpError, invalid, queue_full, too_large
from nvlm_trt.serving.gateway.request_fields import SamplingFields

_Body = TypeVar("_Body", bound=SamplingFields)
# Bodies of all requests that are read at a time: beyond, a request is refused as one beyond the queue is.
_MOST_BODIES = 16
_THREADED_BYTES = 1 << 16  # a larger body is parsed in a thread: the event loop has answers to send
_MOST_KEYS = 1100  # of an object: logit_bias has 1,024. Each unknown key is an error that takes memory.
_LONGEST_KEY = 64


class BodyReader:
    """Reads bodies of at most `max_bytes`, and of at most _MOST_BODIES times that in all requests together."""

    def __init__(self, max_bytes: int, seconds: float) -> None:
        """A body must arrive within `seconds`."""
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._held = 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[_HeldBytes]:
        """Count the bytes of a request's body for as long as the request needs them."""
        held = _HeldBytes()
        try:
            yield held
        finally:
            self._held -= held.count

    async def read(self, request: Request, held: _HeldBytes) -> bytes:
        """Return the body. Raises HttpError for one that is too large, too slow, or not JSON by its Content-Type."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # also keeps a page in a browser from asking without the consent that CORS gives
            raise HttpError(
                415,
                "invalid_request_error",
                "unsupported_media_type",
                "the body must be JSON; send the header `Content-Type: application/json`",
            )
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(request, held), self._seconds)
        except asyncio.TimeoutError:
            raise HttpError(
                408,
                "invalid_request_error",
                "request_timeout",
                f"the body did not arrive within {self._seconds:g} s; send it again",
                headers={"Connection": "close"},
            ) from None

    async def _read(self, request: Request, held: _HeldBytes) -> bytes:
        chunks: list[bytes] = []
        async for chunk in request.stream():
            if held.count + len(chunk) > self._max_bytes:
                raise self._too_large()
            if self._held + len(chunk) > _MOST_BODIES * self._max_bytes:
                raise queue_full("the bodies of other requests take all memory there is for them; try again later")
            held.count += len(chunk)
            self._held += len(chunk)
            chunks.append(chunk)
        return b"".join(chunks)

    def _too_large(self) -> HttpError:
        return too_large(
            f"the body has more than {self._max_bytes >> 20} MiB; send fewer or smaller images, or raise "
            "--max-body-mib of the server"
        )


class _HeldBytes:
    count = 0


async def parse(kind: type[_Body], body: bytes) -> _Body:
    """Parse a body. Raises HttpError that names the first fault."""
    if len(body) < _THREADED_BYTES:
        return _parse(kind, body)
    return await asyncio.to_thread(_parse, kind, body)


def _parse(kind: type[_Body], body: bytes) -> _Body:
    try:
        raw = strict_json.loads(body.decode(), _MOST_KEYS)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits also raises ValueError
        raise invalid("invalid_json", f"the body is not JSON ({error}); send valid JSON") from None
    if not isinstance(raw, dict):
        raise invalid("invalid_json", "the body is not a JSON object; send {...}")
    kind.refuse_unsupported(raw)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise _fault(error, raw) from None


def _fault(error: ValidationError, raw: dict[str, Any]) -> HttpError:
    """Make the answer to the deepest fault: of a value that fits no form, the form that it comes nearest to."""
    faults = error.errors(include_url=False, include_context=False)
    place, fault = max(((_place(fault["loc"], raw), fault) for fault in faults), key=lambda found: len(found[0]))
    where = _path(place)
    if fault["type"] == "extra_forbidden":
        return invalid("unknown_parameter", f"unknown parameter {where}; leave it out", where)
    if fault["type"] == "missing":
        return invalid("missing_parameter", f"{where} is missing; add it", where)
    shown = "" if fault["type"].startswith("union_tag") else f" = {reprlib.repr(fault['input'])}"
    said = " ".join(fault["msg"].split())
    return invalid("invalid_value", f"{where}{shown}: {said[:1].lower()}{said[1:]}", where)


def _place(location: tuple[int | str, ...], raw: Any) -> list[int | str]:
    """Return the place of a fault in the body. pydantic's location also has the names of forms that a value may have.

    The last part of a location may be a key that is missing."""
    place: list[int | str] = []
    value, tagged = raw, False
    for index, part in enumerate(location):
        if not tagged and isinstance(value, dict) and part in (value.get("type"), value.get("role")):
            tagged = True  # the form of a message or of a part
        elif _holds(value, part):
            value, tagged = value[part], False
            place.append(part)
        elif isinstance(value, dict) and index == len(location) - 1 and str(part).isidentifier():
            place.append(part)
    return place


def _holds(value: Any, part: int | str) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _path(place: list[int | str]) -> str:
    """Write a place as messages[0].content, with keys of at most some length and of printable characters."""
    steps = [f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in place]
    return "".join(steps).removeprefix(".")


def _shown(key: str) -> str:
    return key if key.isidentifier() and len(key) <= _LONGEST_KEY else ascii(key[:_LONGEST_KEY])
