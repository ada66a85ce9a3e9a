"""Asks a served engine over gRPC. Answers are streamed; images are paths or encoded bytes."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, cast

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nvlm_trt.api import Answer, Delta, EncodedImage, Message, PromptCount, SamplingParams, merge_answers
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.errors import RequestError, ServerError
from nvlm_trt.image.image_file import read_image_file
from nvlm_trt.prompt.conversation import lift_images
from nvlm_trt.serving.answer_calls import AnswerCalls
from nvlm_trt.serving.async_answer_calls import AsyncAnswerCalls
from nvlm_trt.serving.chat_tensors import MODEL
from nvlm_trt.serving.grpc_messages import count_of, delta_of, infer_request
from nvlm_trt.serving.served_record import ServedRecord

Messages = Sequence[Message | Mapping[str, Any]]
Sampling = SamplingParams | Mapping[str, Any]

_SCHEME = "grpc://"
_READY_SECONDS = 5
_CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_LOOPBACK = ("127.", "localhost:", "[::1]:")


class Client(ClosedOnExit):
    """Asks one server. Thread-safe: the streams of all threads share one connection."""

    def __init__(self, url: str) -> None:
        """Prepare a connection to `url`, grpc://host:port. Sends nothing. Raises ServerError for a malformed `url`."""
        self._url = url
        target = _target(url)
        self._channel = grpc.insecure_channel(target, _options(target))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._calls = AnswerCalls(self._stub)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Iterable[EncodedImage] = (),
        sampling: Sampling | None = None,
        max_tiles: int | None = None,
    ) -> Iterator[Delta]:
        """Stream the answer; its last delta has a finish_reason. With n in `sampling`, the deltas of n answers come
        mixed, each with its answer's index. Closing the iterator cancels the request, and takes a round trip (2 s at
        most).

        Takes either `prompt`, a single user turn, or `messages`. Raises RequestError if the server refuses the request,
        QueueFullError if its queue is full, ServerError if the server cannot be reached or fails.
        """
        request = _request(prompt, messages, images, sampling, max_tiles)
        with closing(self._calls.responses(request)) as responses:
            try:
                for response in responses:
                    delta = delta_of(response)
                    if delta is not None:
                        yield delta
            except grpc.RpcError as error:
                raise _connection_error(self._url, error) from None

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Iterable[EncodedImage] = (),
        sampling: Sampling | None = None,
        max_tiles: int | None = None,
    ) -> Answer:
        """Return the whole answer; see `stream`. Raises RequestError if `sampling` asks for several."""
        _check_one(sampling)
        stream = self.stream(prompt, messages=messages, images=images, sampling=sampling, max_tiles=max_tiles)
        return merge_answers(list(stream))[0]

    def generate_all(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Iterable[EncodedImage] = (),
        sampling: Sampling | None = None,
        max_tiles: int | None = None,
    ) -> list[Answer]:
        """Return the n whole answers that `sampling` asks for; see `stream`."""
        stream = self.stream(prompt, messages=messages, images=images, sampling=sampling, max_tiles=max_tiles)
        return merge_answers(list(stream))

    def ready(self) -> bool:
        """Whether the server is there and all its models are loaded."""
        try:
            return self._stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=_READY_SECONDS).ready
        except grpc.RpcError:
            return False

    def served_engine(self) -> tuple[str, str, ServedRecord | None]:
        """Return Triton's version, the path of the engine directory on the server's machine, and the record of the
        engine that the server has loaded; None: the server is of an earlier nvlm-trt, which gives none.

        Raises ServerError if the server cannot be reached or does not serve an nvlm-trt engine."""
        try:
            version = self._stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=_READY_SECONDS).version
            request = service_pb2.ModelConfigRequest(name=MODEL)
            parameters = self._stub.ModelConfig(request, timeout=_READY_SECONDS).config.parameters
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise _connection_error(self._url, error) from None
            raise ServerError(f"{self._url} does not serve an nvlm-trt engine; name a server of ours") from None
        if "engine" not in parameters:
            raise ServerError(f"{self._url} does not serve an nvlm-trt engine; name a server of ours")
        record = parameters["engine_record"].string_value if "engine_record" in parameters else None
        return version, parameters["engine"].string_value, ServedRecord.from_json(record) if record else None

    def close(self) -> None:
        """Close the connection once the cancelled requests have ended, after 5 s at the latest."""
        self._calls.finish()
        self._channel.close()


class AsyncClient:
    """Asks one server from asyncio, with the methods and errors of `Client`."""

    def __init__(self, url: str) -> None:
        """Prepare a connection to `url`, grpc://host:port. Must run in the event loop that uses the client."""
        self._url = url
        target = _target(url)
        self._channel = grpc.aio.insecure_channel(target, _options(target))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._calls = AsyncAnswerCalls(self._stub)

    async def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Iterable[EncodedImage] = (),
        sampling: Sampling | None = None,
        max_tiles: int | None = None,
        request_id: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Stream as `Client.stream` does. Closing the iterator or cancelling its task cancels the request, and does
        not wait.

        `request_id` names the request in the server's log."""
        # in a thread: files are read, and images copied, while the event loop serves others
        request = await asyncio.to_thread(_request, prompt, messages, images, sampling, max_tiles, request_id)
        async with aclosing(self._responses(request)) as responses:
            async for response in responses:
                delta = delta_of(response)
                if delta is not None:
                    yield delta

    async def count(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Iterable[EncodedImage] = (),
        max_tiles: int | None = None,
        request_id: str = "",
    ) -> PromptCount:
        """Return the number of tokens and tiles of a request, which is not answered. Raises as `Client.stream` does."""
        request = await asyncio.to_thread(_request, prompt, messages, images, None, max_tiles, request_id, True)
        async with aclosing(self._responses(request)) as responses:
            async for response in responses:
                if (count := count_of(response)) is not None:
                    return count
        raise ServerError(f"{self._url} has counted nothing; see what the server says")

    async def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Iterable[EncodedImage] = (),
        sampling: Sampling | None = None,
        max_tiles: int | None = None,
    ) -> Answer:
        """Return the whole answer; see `Client.generate`."""
        _check_one(sampling)
        stream = self.stream(prompt, messages=messages, images=images, sampling=sampling, max_tiles=max_tiles)
        return merge_answers([delta async for delta in stream])[0]

    async def generate_all(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        images: Iterable[EncodedImage] = (),
        sampling: Sampling | None = None,
        max_tiles: int | None = None,
    ) -> list[Answer]:
        """Return the n whole answers that `sampling` asks for; see `Client.stream`."""
        stream = self.stream(prompt, messages=messages, images=images, sampling=sampling, max_tiles=max_tiles)
        return merge_answers([delta async for delta in stream])

    async def ready(self) -> bool:
        """Whether the server is there and all its models are loaded."""
        try:
            response = await self._stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=_READY_SECONDS)
        except grpc.aio.AioRpcError:
            return False
        return response.ready

    async def close(self) -> None:
        """Close the connection; see `Client.close`."""
        await self._calls.finish()
        await self._channel.close()

    async def _responses(
        self, request: service_pb2.ModelInferRequest
    ) -> AsyncGenerator[service_pb2.ModelStreamInferResponse, None]:
        async with aclosing(self._calls.responses(request)) as responses:
            try:
                async for response in responses:
                    yield response
            except grpc.aio.AioRpcError as error:
                raise _connection_error(self._url, error) from None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _target(url: str) -> str:
    target = url.removeprefix(_SCHEME).rstrip("/")
    host, _, port = target.rpartition(":")
    if not url.startswith(_SCHEME) or not host or not port.isdigit():
        raise ServerError(f"server address {url!r} is not grpc://host:port; use what `nvlm-trt serve` prints")
    return target


def _options(target: str) -> list[tuple[str, int]]:
    """Return the options of a channel. Servers on this machine are reached without the environment's proxy."""
    return [*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0 if target.startswith(_LOOPBACK) else 1)]


def _request(
    prompt: str | None,
    messages: Messages | None,
    images: Iterable[EncodedImage],
    sampling: Sampling | None,
    max_tiles: int | None,
    request_id: str = "",
    count_only: bool = False,
) -> service_pb2.ModelInferRequest:
    """Make a request. Images of message parts are sent beside the messages."""
    beside: Sequence[EncodedImage] = _as_list(images)
    if messages is not None and all(isinstance(message, Message) for message in messages):
        messages, beside = lift_images(cast("Sequence[Message]", messages), beside)
    encoded = [image if isinstance(image, bytes) else read_image_file(image) for image in beside]
    return infer_request(prompt, messages, encoded, sampling, max_tiles, request_id, count_only=count_only)


def _as_list(images: Iterable[EncodedImage]) -> list[EncodedImage]:
    if isinstance(images, (bytes, str, os.PathLike)):
        raise RequestError("`images` is a single image; pass a list of images")
    return list(images)


def _check_one(sampling: Sampling | None) -> None:
    n = sampling.n if isinstance(sampling, SamplingParams) else (sampling or {}).get("n", 1)
    if isinstance(n, int) and n > 1:
        raise RequestError(f"`generate` returns one answer, n = {n!r} asks for more; call `generate_all`")


def _connection_error(url: str, error: grpc.RpcError) -> ServerError:
    details = " ".join((error.details() or error.code().name).split())
    if error.code() is grpc.StatusCode.UNAVAILABLE and re.search("failed to connect|resolution|resolving", details):
        return ServerError(f"no server answers at {url}; start one with `nvlm-trt serve`, or check host and port")
    return ServerError(f"the connection to {url} ended ({details}); see what the server says, and ask again")
