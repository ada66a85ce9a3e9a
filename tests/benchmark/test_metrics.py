"""The formulas, against cases worked out by hand and against numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.api import Usage
from nvlm_trt.benchmark import metrics
from nvlm_trt.benchmark.metrics import Distribution, Slo, summarize
from nvlm_trt.benchmark.record import Record

finite = st.floats(-1e6, 1e6)


def usage(**changes: Any) -> Usage:
    values = {"prompt_tokens": 100, "completion_tokens": 4, "image_tiles": 7, "cross_tokens": 0, "cached_images": 1}
    times = {"encode_s": 0.1, "queue_s": 0.3, "ttft_s": 0.5, "total_s": 0.9}
    return Usage(**{**values, **times, **changes})


def record(index: int = 0, **changes: Any) -> Record:
    """Sent at 10; tokens at 10.5 (one), 10.7 (two together), 10.8 (one); ended at 11."""
    values = {
        "index": index,
        "asked_tokens": 4,
        "images": 2,
        "sent": 10.0,
        "ended": 11.0,
        "status": "ok",
        "arrivals": [(10.5, 1), (10.7, 2), (10.8, 1)],
        "usage": usage(),
    }
    return Record(**{**values, **changes})


def test_times_of_one_request() -> None:
    assert metrics.ttft(record()) == pytest.approx(0.5)
    assert metrics.end_to_end(record()) == pytest.approx(1.0)
    # the two tokens that came together share the 0.2 s before them
    assert metrics.token_intervals(record()) == pytest.approx([0.1, 0.1, 0.1])
    assert metrics.mean_interval(record()) == pytest.approx(0.1)
    assert metrics.send_lag(record(due=9.98)) == pytest.approx(0.02)


def test_what_a_request_without_tokens_lacks() -> None:
    nothing = record(arrivals=[])
    assert (metrics.ttft(nothing), metrics.token_intervals(nothing), metrics.mean_interval(nothing)) == (None, [], None)
    one = record(arrivals=[(10.5, 3)])  # three tokens at once: when they were made is not seen
    assert metrics.token_intervals(one) == []
    assert metrics.mean_interval(one) is None
    assert metrics.send_lag(one) is None


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.integers(1, 9)), min_size=1, max_size=30))
def test_intervals_add_up_to_the_time_after_the_first_delta(steps: list[tuple[float, int]]) -> None:
    times = np.cumsum([gap for gap, _ in steps])
    seen = record(sent=0.0, arrivals=[(float(t), count) for t, (_, count) in zip(times, steps, strict=True)])
    intervals = metrics.token_intervals(seen)
    assert len(intervals) == seen.tokens - steps[0][1]
    assert sum(intervals) == pytest.approx(times[-1] - times[0])
    mean = metrics.mean_interval(seen)
    assert (mean is None) == (not intervals)
    if mean is not None:
        assert mean == pytest.approx(np.mean(intervals))


@given(st.lists(finite, min_size=1, max_size=200), st.floats(0, 100))
def test_percentiles_are_numpy_s(values: list[float], percent: float) -> None:
    ours = metrics.percentile(values, percent)
    assert ours == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)
    assert min(values) <= ours <= max(values)


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0, 100), st.floats(0, 100))
def test_percentiles_grow_and_ignore_the_order(values: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert metrics.percentile(values, low) <= metrics.percentile(values, high) + 1e-9
    assert metrics.percentile(values[::-1], a) == metrics.percentile(values, a)


def test_percentiles_by_hand() -> None:
    assert metrics.percentile([4, 1, 3, 2], 50) == 2.5
    assert metrics.percentile(range(101), 99) == 99
    assert metrics.percentile([7], 99) == 7
    assert Distribution.of([]) is None
    assert Distribution.of([1, 2, 3, 4, 5]) == Distribution(5, 3, 3, 4.6, 4.96, 5)


def test_a_load_by_hand() -> None:
    records = [
        record(0, warmup=True, sent=0.0, ended=100.0),  # does not count, however long it took
        record(1),
        record(2, sent=12.0, ended=15.0, arrivals=[(14.0, 1), (15.0, 3)], usage=usage(prompt_tokens=120)),
        record(3, status="rejected", arrivals=[], usage=None, ended=10.0),
        record(4, status="failed", usage=None, ended=99.0),
        record(5, status="cancelled", usage=None, ended=99.0),
    ]
    m = summarize(records, Slo(ttft=1.0))
    assert (m.requests, m.ok, m.rejected, m.failed, m.refused, m.cancelled) == (5, 2, 1, 1, 0, 1)
    assert m.duration_s == pytest.approx(5)  # 10 .. 15
    assert m.requests_per_s == pytest.approx(2 / 5)
    assert (m.output_tokens, m.images, m.tiles, m.cached_images) == (8, 4, 14, 2)
    assert m.output_tokens_per_s == pytest.approx(8 / 5)
    assert m.images_per_s == pytest.approx(4 / 5)
    assert m.tiles_per_s == pytest.approx(14 / 5)
    assert m.prompt_tokens_mean == pytest.approx(110)
    assert m.in_flight_mean == pytest.approx((1 + 3) / 5)
    assert m.tokens_per_delta == pytest.approx(8 / 5)
    assert m.goodput_per_s == pytest.approx(1 / 5)  # the other's first token came after 2 s
    assert m.slo_met == pytest.approx(1 / 4)  # errors count against the server, what we cancelled does not
    assert m.ttft_s == Distribution.of([0.5, 2.0])
    assert m.e2e_s == Distribution.of([1.0, 3.0])
    assert m.itl_s is not None
    assert m.itl_s.count == 6
    assert m.tpot_s is not None
    assert m.tpot_s.max == pytest.approx(1 / 3)


def test_nothing_measured() -> None:
    for records in ([], [record(warmup=True)], [record(status="failed", usage=None)]):
        m = summarize(records, Slo(ttft=1.0))
        numbers = dataclasses.asdict(m)
        assert m.ok == 0
        assert all(numbers[name] is None for name in numbers if name.endswith("_per_s"))
        assert m.ttft_s is m.itl_s is m.e2e_s is None


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(ttft=0.5), True),
        (Slo(ttft=0.49), False),
        (Slo(itl=0.11), True),
        (Slo(itl=0.09), False),
        (Slo(ttft=0.6, itl=0.09), False),
        (Slo(ttft=0.4, itl=0.2), False),
        (Slo(ttft=0.6, itl=0.2), True),
    ],
)
def test_an_slo_is_met_by_all_its_bounds(slo: Slo, met: bool) -> None:
    assert slo.is_met(record()) == met
    assert not slo.is_met(record(status="failed"))


def test_an_slo_and_answers_that_lack_what_it_bounds() -> None:
    assert Slo(ttft=1.0, itl=1e-9).is_met(record(arrivals=[(10.5, 1)]))  # one token has no interval
    assert not Slo(ttft=1.0).is_met(record(arrivals=[]))
    assert summarize([record()]).goodput_per_s is None
    assert summarize([record()], Slo()).goodput_per_s is None, "an SLO that states nothing"
