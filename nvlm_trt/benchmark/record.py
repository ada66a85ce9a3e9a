"""What was seen of one request."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nvlm_trt.api import Usage

# ok: answered to the end, with as many tokens as asked
# rejected: the server's queue was full
# failed: any other error of the server or of the connection
# refused: the server does not accept such requests at all
# cancelled: by us
Status = Literal["ok", "rejected", "failed", "refused", "cancelled"]

# One clock for all processes of a machine: CLOCK_MONOTONIC.
clock = time.monotonic


@dataclass
class Record:
    """Times are `clock` seconds, taken where the request is sent and its answer arrives."""

    index: int
    asked_tokens: int
    images: int
    sent: float
    due: float | None = None  # when it was to be sent, if the load says when
    ended: float = 0.0
    status: Status = "cancelled"
    error: str | None = None
    arrivals: list[tuple[float, int]] = field(default_factory=list)  # (when, how many tokens), one per delta with some
    usage: Usage | None = None  # the server's own account
    warmup: bool = False

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    def to_json(self, origin: float = 0.0) -> dict[str, Any]:
        """Times relative to `origin`."""
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
