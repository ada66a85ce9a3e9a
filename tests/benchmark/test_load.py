"""Tests when requests are sent: `ask` stands in for a server, and no test depends on the speed of the machine."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_trt.benchmark.load import ClosedLoop, Load, OpenLoop, describe
from nvlm_trt.benchmark.record import clock
from nvlm_trt.errors import RequestError, ServerError


class Asked:
    """Answers after a random number of turns of the event loop; notes the requests and how many are open at a time."""

    def __init__(self, seed: int = 0, fails_at: int | None = None) -> None:
        self.order: list[int] = []
        self.due: list[float | None] = []
        self.open = self.most_open = self.cancelled = 0
        self._rng = np.random.default_rng(seed)
        self._fails_at = fails_at

    async def __call__(self, index: int, due: float | None) -> None:
        self.order.append(index)
        self.due.append(due)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            for _ in range(self._rng.integers(1, 20)):
                await asyncio.sleep(0)
            if index == self._fails_at:
                raise ServerError("gone")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 1000))
def test_a_closed_loop_keeps_its_concurrency(concurrency: int, count: int, seed: int) -> None:
    asked = Asked(seed)
    asyncio.run(ClosedLoop(concurrency).drive(asked, count))
    assert asked.order == list(range(count)), "each once, in order"
    assert asked.most_open == min(concurrency, count), "never more, and no fewer"
    assert asked.due == [None] * count
    assert asked.open == 0


def test_gaps_are_those_of_a_poisson_process() -> None:
    """Gaps have mean and standard deviation 1 / rate, arrivals per second have mean and variance rate."""
    rate, count = 5.0, 200_000
    arrivals = np.array(OpenLoop(rate, seed=3).arrivals(count))
    gaps = np.diff(arrivals, prepend=0.0)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / rate, rel=4 / math.sqrt(count))  # 4 standard errors
    assert gaps.std() == pytest.approx(1 / rate, rel=8 / math.sqrt(count))
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / math.sqrt(count), "independent"
    per_second = np.bincount(arrivals.astype(int))[:-1]
    assert per_second.mean() == pytest.approx(rate, rel=0.01)
    assert per_second.var() == pytest.approx(rate, rel=0.04)
    # the median of an exponential distribution is ln 2 / rate
    assert (gaps < math.log(2) / rate).mean() == pytest.approx(0.5, abs=0.005)


def test_arrivals_are_repeatable_and_scale_with_the_rate() -> None:
    slow, fast = OpenLoop(2, seed=1).arrivals(50), OpenLoop(8, seed=1).arrivals(50)
    assert slow == OpenLoop(2, seed=1).arrivals(50)
    assert slow == pytest.approx([4 * at for at in fast])
    assert slow[:10] == OpenLoop(2, seed=1).arrivals(10)
    assert slow != OpenLoop(2, seed=2).arrivals(50)


def test_an_open_loop_asks_on_time_without_answers() -> None:
    class Unanswered:
        def __init__(self) -> None:
            self.seen: list[tuple[int, float, float]] = []
            self.all_asked = asyncio.Event()

        async def __call__(self, index: int, due: float | None) -> None:
            assert due is not None
            self.seen.append((index, due, clock()))
            if len(self.seen) == 40:
                self.all_asked.set()
            await self.all_asked.wait()  # answers none before all are asked

    async def drive() -> Unanswered:
        asked = Unanswered()
        await OpenLoop(400.0, seed=5).drive(asked, 40)
        return asked

    seen = asyncio.run(drive()).seen
    assert sorted(index for index, _, _ in seen) == list(range(40))
    assert all(now >= due - 0.002 for _, due, now in seen), "never early (beyond a timer's resolution)"
    by_index = [due for _, due, _ in sorted(seen)]
    wanted = OpenLoop(400.0, seed=5).arrivals(40)
    assert [due - by_index[0] for due in by_index] == pytest.approx([at - wanted[0] for at in wanted], abs=1e-6)


@pytest.mark.parametrize("load", [ClosedLoop(4), OpenLoop(20.0)], ids=str)
def test_an_error_ends_the_load(load: Load) -> None:
    asked = Asked(fails_at=5)
    with pytest.raises(ServerError, match="gone"):
        asyncio.run(load.drive(asked, 50))
    assert asked.open == 0, "nothing is left running"
    assert len(asked.order) < 50, "and nothing more is asked"


@pytest.mark.parametrize("load", [ClosedLoop(4), OpenLoop(1e6)], ids=str)
def test_a_cancelled_load_leaves_nothing_running(load: Load) -> None:
    async def ask(index: int, due: float | None) -> None:
        opened.append(index)
        try:
            await asyncio.Event().wait()
        finally:
            closed.append(index)

    async def drive() -> None:
        driving = asyncio.ensure_future(load.drive(ask, 4))
        while len(opened) < 4:
            await asyncio.sleep(0)
        driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving
        assert sorted(closed) == sorted(opened)

    opened: list[int] = []
    closed: list[int] = []
    asyncio.run(drive())


def test_loads_check_and_name_themselves() -> None:
    for wrong in (0, -1, 10_001):
        with pytest.raises(RequestError, match="concurrency"):
            ClosedLoop(wrong)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="rate"):
            OpenLoop(rate)
    for load in (ClosedLoop(8), OpenLoop(2.5)):
        assert describe(load.to_dict()) == str(load)
