"""Answers from a running server, over gRPC."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

from nvlm_trt.api import ChatRequest, Delta, PromptCount
from nvlm_trt.errors import ImageError, RequestError, ServerError
from nvlm_trt.serving.client import AsyncClient
from nvlm_trt.serving.gateway.source import ServedModel
from nvlm_trt.serving.served_engine import find_served_engine

_OF_AN_IMAGE = re.compile(r"image( [0-9]+)?: ")  # Triton tells only the message of an error


class TritonSource:
    """Implements `ChatSource` with a client of one server."""

    def __init__(self, url: str, model: ServedModel) -> None:
        """Prepare a connection. Must run in the event loop of the gateway."""
        self.model = model
        self._client = AsyncClient(url)

    @classmethod
    async def connect(cls, url: str) -> TritonSource:
        """Find out what is served at `url`. Raises ServerError."""
        served = await asyncio.to_thread(find_served_engine, url)
        if served.record is None:
            raise ServerError(f"{url} is served by an earlier nvlm-trt; start the server again with this one")
        return cls(url, ServedModel.of(served.record))

    async def stream(self, chat: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        """See `ChatSource.stream`."""
        deltas = self._client.stream(
            messages=chat.messages, sampling=chat.sampling, max_tiles=chat.max_tiles, request_id=request_id
        )
        try:
            async for delta in deltas:
                yield delta
        except RequestError as error:
            raise _told_apart(error) from None
        finally:
            await deltas.aclose()

    async def count(self, chat: ChatRequest, request_id: str) -> PromptCount:
        """See `ChatSource.count`."""
        try:
            return await self._client.count(messages=chat.messages, max_tiles=chat.max_tiles, request_id=request_id)
        except RequestError as error:
            raise _told_apart(error) from None

    async def ready(self) -> bool:
        return await self._client.ready()

    async def close(self) -> None:
        await self._client.close()


def _told_apart(error: RequestError) -> RequestError | ImageError:
    return ImageError(str(error)) if _OF_AN_IMAGE.match(str(error)) else error
