"""Decides when requests are sent: each after an answer (closed loop), or at times set before (open loop)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nvlm_trt.benchmark.record import clock
from nvlm_trt.errors import RequestError

Ask = Callable[[int, float | None], Awaitable[None]]  # (index, when it is due or None); ends with the answer

_MOST_CONCURRENCY = 10_000
_OPEN_WARMUP = 8


@dataclass(frozen=True)
class ClosedLoop:
    """Runs `concurrency` users. Each asks again after an answer, so the server never has more requests at a time.

    The users take the next request from one list, so that all are busy until the list is empty.
    """

    concurrency: int

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= _MOST_CONCURRENCY:
            raise RequestError(f"concurrency {self.concurrency} is not possible; choose 1 to {_MOST_CONCURRENCY}")

    @property
    def default_warmup(self) -> int:
        """Returns as many requests as there are users: the first requests of all users come at once."""
        return self.concurrency

    async def drive(self, ask: Ask, count: int) -> None:
        """Asks requests 0 .. count-1 and waits for all answers. If `ask` raises, cancels the others and raises."""
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
    """Sends on average `rate` requests per second, a Poisson process, whether or not earlier requests are answered."""

    rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and 0 < self.rate <= 1e6):
            raise RequestError(f"a rate of {self.rate} requests per second is not possible; choose 2.5 for example")

    @property
    def default_warmup(self) -> int:
        return _OPEN_WARMUP

    def arrivals(self, count: int) -> Sequence[float]:
        """Returns when each request is due, seconds from the start.

        The gaps between arrivals are independent and exponential with mean 1 / rate.
        """
        # scales the same gaps for every rate, so that loads differ in nothing else
        gaps = np.random.default_rng([self.seed, 1]).exponential(1.0, count)
        return [float(at) for at in np.cumsum(gaps) / self.rate]

    async def drive(self, ask: Ask, count: int) -> None:
        """Does the same as `ClosedLoop.drive`."""
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
    """Names a load that is given as in the results."""
    if load["mode"] == "closed":
        return str(ClosedLoop(load["concurrency"]))
    return str(OpenLoop(load["rate"]))


async def _all_or_none(work: Iterable[Awaitable[None]]) -> None:
    """Waits for all of `work`. If one fails or the caller is cancelled, cancels the others before it returns."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
