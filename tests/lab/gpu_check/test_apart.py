"""Apart: what becomes of a function that fails, dies or hangs in its process, and of the functions after it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from lab.gpu_check.apart import Apart, ApartError
from lab.gpu_check.record import PASSED, SLOW, NotAvailableError, Result


@pytest.fixture
def apart() -> Iterator[Apart]:
    with Apart() as made:
        yield made


def process() -> Result:
    return Result(PASSED, {"process": os.getpid()})


def lacking() -> Result:
    raise NotAvailableError("no such thing here")


def broken() -> Result:
    raise ValueError("first line\nsecond line")


def dying() -> Result:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Result(PASSED)


def hanging() -> Result:
    time.sleep(100)
    return Result(PASSED)


def test_functions_share_a_process_until_one_fails(apart: Apart) -> None:
    first = apart.call(process, 20).values["process"]
    assert first != os.getpid()
    with pytest.raises(NotAvailableError, match="no such thing here"):
        apart.call(lacking, 20)
    assert apart.call(process, 20).values["process"] == first
    with pytest.raises(ApartError, match=r"(?s)^ValueError: first line\nTraceback.*second line"):
        apart.call(broken, 20)
    second = apart.call(process, 20).values["process"]
    assert second != first
    assert apart.call(process, 20, fresh=True).values["process"] not in (first, second)


def test_a_process_that_dies_or_hangs_is_told(apart: Apart) -> None:
    with pytest.raises(ApartError, match="its process ended with SIGSEGV"):
        apart.call(dying, 20)
    assert apart.call(hanging, 0.3) == Result(SLOW, note="it took more than 0 s and was ended")
    assert apart.call(process, 20).status == PASSED
