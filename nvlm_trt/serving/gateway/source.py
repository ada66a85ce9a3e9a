"""Defines what the gateway asks: an engine in this process, or a server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from nvlm_trt.api import ChatRequest, Delta, PromptCount
from nvlm_trt.serving.served_record import ServedRecord


@dataclass(frozen=True)
class ServedModel:
    """What the gateway tells and checks of the engine behind it."""

    name: str
    fingerprint: str  # of the engine: another one may give other answers
    checkpoint_digest: str
    max_seq_len: int
    max_slots: int
    max_tiles: int  # per image, thumbnail not counted

    @property
    def system_fingerprint(self) -> str:
        return f"fp_{self.fingerprint[:12]}"

    @classmethod
    def of(cls, record: ServedRecord) -> ServedModel:
        limits = record.limits
        return cls(
            record.model,
            record.fingerprint,
            record.digest,
            limits["max_seq_len"],
            limits["max_slots"],
            limits["max_tiles"],
        )


class ChatSource(Protocol):
    """Answers requests. Its methods run in the event loop of the gateway and must not hold it up."""

    model: ServedModel

    def stream(self, chat: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        """Stream the answers to one request. Closing the iterator, or cancelling the task that reads it, frees the
        request's slots within one step. Raises the errors of nvlm_trt.errors."""
        ...

    async def count(self, chat: ChatRequest, request_id: str) -> PromptCount:
        """Count the tokens and tiles of a request, and run no model. Raises as `stream` does."""
        ...

    async def ready(self) -> bool: ...

    async def close(self) -> None: ...
