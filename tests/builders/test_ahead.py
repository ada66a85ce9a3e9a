"""Items made ahead of their use come in order, with the errors in their places, and no more of them are made."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.builders.ahead import _AHEAD, ahead


@given(st.lists(st.integers()))
def test_items_are_those_of_the_iterator(items: list[int]) -> None:
    assert list(ahead(iter(items))) == items


def test_the_next_item_is_made_while_one_is_used() -> None:
    made = [threading.Event() for _ in range(10)]

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            event.set()
            yield i

    for i in ahead(items()):
        assert made[min(i + 1, 9)].wait(10)


@pytest.mark.parametrize("error", [ValueError("NaN"), OSError("gone"), MemoryError()])
def test_an_error_has_the_place_of_its_item(error: Exception) -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise error

    got = []
    with pytest.raises(type(error)) as raised:
        for item in ahead(items()):
            got.append(item)
    assert raised.value is error
    assert got == [1, 2]


def test_an_iterator_that_is_left_makes_no_more() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(1000):
            made.append(i)
            yield i

    iterator = ahead(items())
    assert next(iterator) == 0
    iterator.close()  # type: ignore[attr-defined]
    assert len(made) <= 2 + _AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nvlm-ahead")]
