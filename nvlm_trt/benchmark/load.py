"""When requests are sent: by users who wait for their answers (closed loop) or at times of their own (open loop)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvlm_trt.benchmark.record import clock
from nvlm_trt.errors import RequestError

Ask = Callable[[int, float | None], Awaitable[None]]  # (index, when it is due or None), done when it is answered

_MOST_CONCURRENCY = 10_000
_OPEN_WARMUP = 8


@dataclass(frozen=True)
class ClosedLoop:
    """So many users, each of whom asks again once answered: the server is never asked for more at a time.

    Users take the next request from one list, so that all are busy until the list is empty.
    """

    concurrency: int

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= _MOST_CONCURRENCY:
            raise RequestError(f"concurrency {self.concurrency} is not possible; choose 1 to {_MOST_CONCURRENCY}")

    @property
    def default_warmup(self) -> int:
        """The users' first requests, which all come at once."""
        return self.concurrency

    async def drive(self, ask: Ask, count: int) -> None:
        """Ask 0 .. count-1 and wait for all answers. What `ask` raises ends the others and is raised."""
        indices = iter(range(count))

        async def user() -> None:
            for index in indices:
                await ask(index, None)

        await _all_or_none([user() for _ in range(min(self.concurrency, count))])

    def to_dict(self) -> dict[str, Any]:
        return {"mode": "closed", "concurrency": self.concurrency}

    def __str__(self) -> str:
        return f"{self.concurrency} at once"


@dataclass(frozen=True)
class OpenLoop:
    """A Poisson process: on average `rate` requests per second, whether or not earlier ones are answered."""

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and 0 < self.rate <= 1e6):
            raise RequestError(f"a rate of {self.rate} requests per second is not possible; choose 2.5 for example")

    @property
    def default_warmup(self) -> int:
        return _OPEN_WARMUP

    def arrivals(self, count: int) -> Sequence[float]:
        """Seconds from the start; the gaps are independent and exponential with mean 1 / rate."""
        # the same gaps at every rate, only scaled: rates then differ in nothing else
        gaps = np.random.default_rng([self.seed, 1]).exponential(1.0, count)
        return [float(at) for at in np.cumsum(gaps) / self.rate]

    async def drive(self, ask: Ask, count: int) -> None:
        """See `ClosedLoop.drive`."""
        start = clock()

        async def arrive(index: int, due: float) -> None:
            await asyncio.sleep(due - clock())
            await ask(index, due)

        await _all_or_none([arrive(index, start + at) for index, at in enumerate(self.arrivals(count))])

    def to_dict(self) -> dict[str, Any]:
        return {"mode": "open", "rate": self.rate}

    def __str__(self) -> str:
        return f"{self.rate:g} /s"


Load = ClosedLoop | OpenLoop


def describe(load: dict[str, Any]) -> str:
    """A load as it stands in results, in words."""
    if load["mode"] == "closed":
        return str(ClosedLoop(load["concurrency"]))
    return str(OpenLoop(load["rate"]))


async def _all_or_none(work: Iterable[Awaitable[None]]) -> None:
    """Once one fails or this is cancelled, none is left running."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
