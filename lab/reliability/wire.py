"""Sends one request over gRPC or HTTP, and says what came back."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.api import Delta
from nvlm_trt.errors import NvlmError, RequestError, ServerError
from nvlm_trt.serving.answer_calls import AnswerCalls
from nvlm_trt.serving.chat_tensors import decode_error
from nvlm_trt.serving.grpc_messages import delta_of

_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]
_DATA = b"data: "


@dataclass(frozen=True)
class Reply:
    """Holds the tokens, or the error as a client of ours would raise it. `status` is HTTP's.

    `broken` says what no client should see: no answer in time, a connection that ended, a response that is no JSON."""

    tokens: tuple[int, ...] = ()
    error: NvlmError | None = None
    status: int | None = None
    broken: str = ""

    @property
    def answered(self) -> bool:
        return self.error is None and not self.broken


class Wire:
    """Keeps one gRPC connection. Thread-safe."""

    def __init__(self, address: str, http_address: str) -> None:
        self._channel = grpc.insecure_channel(address.removeprefix("grpc://"), _CHANNEL)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._calls = AnswerCalls(self._stub)
        self._host = urllib.parse.urlsplit(http_address).netloc

    def close(self) -> None:
        self._calls.finish()
        self._channel.close()

    def send_grpc(self, message: service_pb2.ModelInferRequest, take: int, seconds: float) -> Reply:
        """Reads up to `take` deltas, then cancels as gRPC does. Reads a stream with an error to its end."""
        call = self._stub.ModelStreamInfer(iter([message]), timeout=seconds)
        try:
            reply = _read_stream(message, call, take)
            if reply.error:  # tritonserver 2.51 keeps the memory of streams that are cancelled as they end
                with contextlib.suppress(grpc.RpcError):
                    for _ in call:
                        pass
            return reply
        finally:
            call.cancel()

    def leave_grpc(self, message: service_pb2.ModelInferRequest, take: int) -> Reply:
        """Reads up to `take` deltas, then leaves as our client does."""
        with contextlib.closing(self._calls.responses(message)) as responses:
            return _read_stream(message, responses, take)

    def send_http(self, path: str, body: bytes, take: int, seconds: float) -> Reply:
        """Posts the body; reads up to `take` events of a stream, then leaves."""
        connection = http.client.HTTPConnection(self._host, timeout=seconds)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.getheader("Content-Type", "").startswith("text/event-stream"):
                lines = (line for line in iter(response.readline, b"") if line.strip())
                return read_events(list(itertools.islice(lines, take)), response.status)
            return read_body(response.read(), response.status)
        except TimeoutError:
            return Reply(broken=f"no answer within {seconds:.0f} s")
        except (OSError, http.client.HTTPException) as error:
            return Reply(broken=f"the connection ended ({type(error).__name__}: {error})")
        finally:
            connection.close()


def read_events(lines: Sequence[bytes], status: int) -> Reply:
    """Reads the lines of a stream of events."""
    tokens: list[int] = []
    for line in lines:
        if not line.startswith(_DATA):
            return Reply(broken=f"a line that is no event: {line[:100]!r}", status=status)
        reply = read_body(line.removeprefix(_DATA), status)
        if not reply.answered:
            return reply
        tokens += reply.tokens
    return Reply(tuple(tokens), status=status)


def read_body(body: bytes, status: int) -> Reply:
    """Reads one JSON object: an error, or the outputs of a response."""
    if not body.strip():
        return Reply(status=status, error=None if status < 400 else ServerError(f"status {status}"))
    try:
        values = json.loads(body)
    except ValueError:
        if status >= 400:
            return Reply(status=status, error=ServerError(" ".join(body.decode(errors="replace").split())))
        return Reply(status=status, broken=f"a body that is not JSON: {body[:100]!r}")
    if "error" in values:
        return Reply(status=status, error=decode_error(values["error"]))
    found = values.get("token_ids", [])
    return Reply(tuple(found if isinstance(found, list) else [found]), status=status)


def refused(reply: Reply) -> bool:
    return isinstance(reply.error, RequestError)


def _read_stream(
    message: service_pb2.ModelInferRequest, responses: Iterable[service_pb2.ModelStreamInferResponse], take: int
) -> Reply:
    tokens: list[int] = []
    try:
        for response in itertools.islice(responses, take):
            delta = delta_of(response) if message.model_name.startswith("nvlm") else _foreign(response)
            tokens += delta.token_ids if delta else []
    except NvlmError as error:
        return Reply(tuple(tokens), error)
    except grpc.RpcError as error:
        return _broken_call(tokens, error)
    except (ValueError, KeyError, AssertionError) as error:
        return Reply(tuple(tokens), broken=f"a response that the client cannot read ({error!r})")
    return Reply(tuple(tokens))


def _foreign(response: service_pb2.ModelStreamInferResponse) -> Delta | None:
    """Raises the error of a response of another model; its outputs do not matter."""
    if response.error_message:
        raise decode_error(response.error_message)
    return None


def _broken_call(tokens: Sequence[int], error: grpc.RpcError) -> Reply:
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Reply(tuple(tokens), broken="no answer in time")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN):
        return Reply(tuple(tokens), broken=f"the connection ended ({code.name}: {details})")
    return Reply(tuple(tokens), ServerError(details or code.name))
