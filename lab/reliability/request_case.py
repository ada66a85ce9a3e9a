"""Holds one request of the fuzz as it goes over the wire."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tritonclient.grpc import service_pb2

GRPC, HTTP = "gRPC", "HTTP"
ANSWER, REFUSAL, EITHER = "answer", "refusal", "either"


@dataclass(frozen=True)
class RequestCase:
    """Says what is sent, how many responses are read before the client leaves, and what has to come back.

    `ours` says that the product's own code judges the request: tritonserver refuses others in its own words."""

    made: str
    message: service_pb2.ModelInferRequest | None = None  # gRPC
    path: str = ""  # HTTP
    body: bytes = b""
    take: int = 1000
    expected: str = EITHER
    ours: bool = True

    @property
    def transport(self) -> str:
        return HTTP if self.message is None else GRPC

    @property
    def sent(self) -> bytes:
        """Returns the bytes for a finding."""
        if self.message is None:
            return json.dumps({"path": self.path}).encode() + b"\n" + self.body
        return self.message.SerializeToString()
