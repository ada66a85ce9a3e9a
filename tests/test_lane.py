from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nvlm_trt.lane import AbandonedError, Lane

WAIT = 30.0


def test_places_are_handed_out_in_the_order_of_arrival() -> None:
    lane, order = Lane(2), []
    lane.enter()
    lane.enter()

    def wait_and_note(number: int) -> None:
        with lane.turn():
            order.append(number)

    with ThreadPoolExecutor(8) as pool:
        for number in range(8):
            pool.submit(wait_and_note, number)
            wait_until_waiting(lane, number + 1)
        assert not lane.try_enter()
        assert order == []
        lane.leave()  # one place serves all of them
    assert order == list(range(8))
    assert lane.try_enter()
    assert not lane.try_enter()


def test_who_gives_up_waiting_holds_up_nobody() -> None:
    lane = Lane(1)
    over = threading.Event()
    entered = []
    lane.enter()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lane.enter, over.is_set)
        wait_until_waiting(lane, 1)
        second = pool.submit(lambda: (lane.enter(), entered.append(2)))
        wait_until_waiting(lane, 2)
        over.set()
        with pytest.raises(AbandonedError):
            first.result(WAIT)
        assert entered == []
        lane.leave()
        second.result(WAIT)
    lane.leave()
    assert lane.try_enter()


def test_an_error_during_a_turn_gives_the_place_back() -> None:
    lane = Lane(1)
    with pytest.raises(ValueError, match="oops"), lane.turn():
        raise ValueError("oops")
    assert lane.try_enter()


def wait_until_waiting(lane: Lane, count: int) -> None:
    deadline = time.monotonic() + WAIT
    while len(lane._waiting) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)
