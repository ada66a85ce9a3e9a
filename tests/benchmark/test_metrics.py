"""Compares the formulas with cases worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_trt.api import Usage
from nvlm_trt.benchmark import request_metrics
from nvlm_trt.benchmark.distribution import Distribution
from nvlm_trt.benchmark.metrics import summarize
from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.slo import Slo

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
    assert request_metrics.ttft(record()) == pytest.approx(0.5)
    assert request_metrics.end_to_end(record()) == pytest.approx(1.0)
    # the two tokens that came together share the 0.2 s before them
    assert request_metrics.token_intervals(record()) == pytest.approx([0.1, 0.1, 0.1])
    assert request_metrics.mean_interval(record()) == pytest.approx(0.1)
    assert request_metrics.send_lag(record(due=9.98)) == pytest.approx(0.02)


def test_a_request_without_tokens_lacks_latencies() -> None:
    nothing = record(arrivals=[])
    assert (
        request_metrics.ttft(nothing),
        request_metrics.token_intervals(nothing),
        request_metrics.mean_interval(nothing),
    ) == (None, [], None)
    one = record(arrivals=[(10.5, 3)])  # three tokens at once: their intervals are unknown
    assert request_metrics.token_intervals(one) == []
    assert request_metrics.mean_interval(one) is None
    assert request_metrics.send_lag(one) is None


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.integers(1, 9)), min_size=1, max_size=30))
def test_intervals_add_up_to_the_time_after_the_first_delta(steps: list[tuple[float, int]]) -> None:
    times = np.cumsum([gap for gap, _ in steps])
    seen = record(sent=0.0, arrivals=[(float(t), count) for t, (_, count) in zip(times, steps, strict=True)])
    intervals = request_metrics.token_intervals(seen)
    assert len(intervals) == seen.tokens - steps[0][1]
    assert sum(intervals) == pytest.approx(times[-1] - times[0])
    mean = request_metrics.mean_interval(seen)
    assert (mean is None) == (not intervals)
    if mean is not None:
        assert mean == pytest.approx(np.mean(intervals))


def interpolated(values: list[float], percent: float) -> float:
    """The definition of a percentile: the sorted value at position (n - 1) * percent / 100, interpolated linearly."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    summary = Distribution.of(values)
    assert summary is not None
    return summary.p50, summary.p90, summary.p99


@given(st.lists(finite, min_size=1, max_size=200))
def test_percentiles_are_interpolated(values: list[float]) -> None:
    for percent, ours in zip((50, 90, 99), percentiles(values), strict=True):
        assert ours == pytest.approx(interpolated(values, percent), rel=1e-9, abs=1e-6)
        assert ours == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)
        assert min(values) <= ours <= max(values)


@given(st.lists(finite, min_size=1, max_size=50))
def test_percentiles_grow_and_ignore_the_order(values: list[float]) -> None:
    p50, p90, p99 = percentiles(values)
    assert p50 <= p90 + 1e-9
    assert p90 <= p99 + 1e-9
    assert percentiles(values[::-1]) == (p50, p90, p99)


def test_percentiles_by_hand() -> None:
    assert percentiles([4, 1, 3, 2])[0] == 2.5
    assert percentiles(list(range(101)))[2] == 99
    assert percentiles([7])[2] == 7
    assert Distribution.of([]) is None
    assert Distribution.of([1, 2, 3, 4, 5]) == Distribution(5, 3, 3, 4.6, 4.96, 5)


def test_metrics_of_a_load_by_hand() -> None:
    records = [
        record(0, warmup=True, sent=0.0, ended=100.0),  # a warm-up does not count, however long it took
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
    assert m.goodput_per_s == pytest.approx(1 / 5)  # the first token of the other request came after 2 s
    assert m.slo_met == pytest.approx(1 / 4)  # errors count against the server, cancelled requests do not
    assert m.ttft_s == Distribution.of([0.5, 2.0])
    assert m.e2e_s == Distribution.of([1.0, 3.0])
    assert m.itl_s is not None
    assert m.itl_s.count == 6
    assert m.tpot_s is not None
    assert m.tpot_s.max == pytest.approx(1 / 3)


def test_a_load_without_answers_has_no_rates_or_latencies() -> None:
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


def test_an_slo_bounds_only_latencies_that_an_answer_has() -> None:
    assert Slo(ttft=1.0, itl=1e-9).is_met(record(arrivals=[(10.5, 1)]))  # one token has no interval
    assert not Slo(ttft=1.0).is_met(record(arrivals=[]))
    assert summarize([record()]).goodput_per_s is None
    assert summarize([record()], Slo()).goodput_per_s is None, "an SLO that states nothing"
