"""Holds the client's observations of one request."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nvlm_trt.api import Usage

# ok: answered to the end, with as many tokens as asked
# rejected: the server's queue was full
# failed: any other error of the server or of the connection
# refused: the server does not accept such requests at all
# cancelled: by the client
Status = Literal["ok", "rejected", "failed", "refused", "cancelled"]

# One clock for all processes of a machine: CLOCK_MONOTONIC.
clock = time.monotonic


@dataclass
class Record:
    """Records one request. Times are `clock` seconds in the process that sends the request and receives its answer."""

    index: int
    asked_tokens: int
    images: int
    sent: float
    due: float | None = None  # when the request had to be sent, if the load sets a time
    ended: float = 0.0
    status: Status = "cancelled"
    error: str | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (when, tokens), one per delta with tokens
    usage: Usage | None = None  # times and counts that the server reports
    warmup: bool = False

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    def to_json(self, origin: float = 0.0) -> dict[str, Any]:
        """Returns the record with times relative to `origin`."""
        return asdict(self) | {
            "sent": self.sent - origin,
            "due": None if self.due is None else self.due - origin,
            "ended": self.ended - origin,
            "arrivals": [(when - origin, count) for when, count in self.arrivals],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Record:
        usage = values["usage"]
        arrivals = [(when, count) for when, count in values["arrivals"]]
        return cls(**{**values, "arrivals": arrivals, "usage": Usage(**usage) if usage else None})
