"""Tests what is observed of a request, and the reasons under which requests without an answer are counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nvlm_trt.api import Delta, Usage
from nvlm_trt.errors import (
    EngineError,
    ImageError,
    ParameterError,
    QueueFullError,
    RequestError,
    ServerError,
    TooLargeError,
)
from nvlm_trt.serving.triton.models import histograms, observed_request
from nvlm_trt.serving.triton.models.error_reason import REASONS, error_reason
from nvlm_trt.serving.triton.models.histograms import (
    END_TO_END,
    FIRST_TOKEN,
    HISTOGRAMS,
    IMAGE_TILES,
    INTER_TOKEN,
    PROMPT_TOKENS,
    QUEUE_TIME,
    Histogram,
    Observations,
)
from nvlm_trt.serving.triton.models.observed_request import ObservedRequest

USAGE = Usage(30, 3, 7, 0, 0, 0.0, 0.25, 0.0, 0.0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An observed request that arrived at 10 s; `pass_on(second, event)` gives it an event at that time."""
    observed: dict[Histogram, list[float]] = {}
    failures: list[Exception] = []
    passed: list[object] = []
    metrics: Any = SimpleNamespace(
        observations=SimpleNamespace(add=lambda which, value: observed.setdefault(which, []).append(value)),
        add_failure=failures.append,
    )
    request = ObservedRequest(metrics, passed.append, arrived=10.0)

    def pass_on(second: float, event: Delta | Exception) -> None:
        monkeypatch.setattr(observed_request.time, "monotonic", lambda: second)
        request(event)
        assert passed[-1] is event

    return SimpleNamespace(pass_on=pass_on, observed=observed, failures=failures)


def test_times_of_an_answer(seen: SimpleNamespace) -> None:
    seen.pass_on(12.0, Delta("a", [1]))
    seen.pass_on(12.5, Delta("", [2]))
    seen.pass_on(14.5, Delta("bc", [3], finish_reason="stop", usage=USAGE))
    assert seen.observed == {
        FIRST_TOKEN: [2.0],
        INTER_TOKEN: [0.5, 2.0],
        END_TO_END: [4.5],
        QUEUE_TIME: [0.25],
        PROMPT_TOKENS: [30],
        IMAGE_TILES: [7],
    }
    assert not seen.failures


def test_tokens_that_come_together_share_their_interval(seen: SimpleNamespace) -> None:
    seen.pass_on(11.0, Delta("a", [1, 2]))
    seen.pass_on(13.0, Delta("a", [3, 4, 5, 6]))
    assert seen.observed == {FIRST_TOKEN: [1.0], INTER_TOKEN: [0.0] + [0.5] * 4}


def test_times_of_several_answers(seen: SimpleNamespace) -> None:
    """One first token and one end; the intervals are those between tokens of the same answer."""
    seen.pass_on(11.0, Delta("a", [1], index=0))
    seen.pass_on(11.0, Delta("b", [2], index=1))
    seen.pass_on(11.5, Delta("", [3], index=0, finish_reason="stop"))
    seen.pass_on(13.0, Delta("", [4, 5], index=1, finish_reason="length", usage=USAGE))
    assert seen.observed[FIRST_TOKEN] == [1.0]
    assert seen.observed[INTER_TOKEN] == [0.5, 1.0, 1.0]
    assert seen.observed[END_TO_END] == [3.0]
    assert seen.observed[QUEUE_TIME] == [0.25]


def test_a_cancelled_request_has_no_end_to_end_time(seen: SimpleNamespace) -> None:
    seen.pass_on(11.0, Delta("a", [1]))
    seen.pass_on(12.0, Delta("", [], finish_reason="cancelled", usage=USAGE))
    assert END_TO_END not in seen.observed
    assert seen.observed[QUEUE_TIME] == [0.25]


def test_a_request_cancelled_before_its_slot_is_not_observed(seen: SimpleNamespace) -> None:
    seen.pass_on(12.0, Delta("", [], finish_reason="cancelled"))
    assert not seen.observed


def test_a_failure_is_counted(seen: SimpleNamespace) -> None:
    error = ImageError("broken")
    seen.pass_on(12.0, error)
    assert seen.failures == [error]
    assert not seen.observed


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueFullError("full"), "queue_full"),
        (TooLargeError("long"), "too_large"),
        (ImageError("torn"), "bad_image"),
        (ParameterError("hot"), "bad_parameter"),
        (RequestError("empty"), "bad_request"),
        (ServerError("stopping"), "stopping"),
        (EngineError("broken"), "internal"),
        (ValueError("a defect"), "internal"),
    ],
)
def test_reasons(error: Exception, reason: str) -> None:
    assert error_reason(error) == reason
    assert reason in REASONS


def test_observations_are_sent_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, float]] = []

    class Family:
        HISTOGRAM = "histogram"

        def __init__(self, name: str, description: str, kind: str) -> None:
            assert kind == self.HISTOGRAM
            self._name = name

        def Metric(self, labels: dict[str, str], buckets: list[float]) -> Any:  # noqa: N802
            assert buckets == sorted(set(buckets))
            return SimpleNamespace(observe=lambda value: sent.append((self._name, value)))

    monkeypatch.setattr(histograms, "_MOST_UNSENT", 3)
    observations = Observations(SimpleNamespace(MetricFamily=Family))
    observations.add(IMAGE_TILES, 7)
    observations.add(FIRST_TOKEN, 0.5)
    observations.send()
    observations.send()
    assert sent == [("nvlm_request_image_tiles", 7), ("nvlm_time_to_first_token_seconds", 0.5)]
    for value in range(5):
        observations.add(IMAGE_TILES, value)
    observations.send()
    assert [value for _, value in sent[2:]] == [2, 3, 4]


def test_many_observations_are_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []
    family = SimpleNamespace(Metric=lambda **_: SimpleNamespace(observe=sent.append))
    make_family: Any = lambda *_: family  # noqa: E731
    make_family.HISTOGRAM = "histogram"
    monkeypatch.setattr(histograms, "_SENT_AT_ONCE", 2)
    observations = Observations(SimpleNamespace(MetricFamily=make_family))
    for value in range(5):
        observations.add(IMAGE_TILES, value)
    assert [observations.send() for _ in range(4)] == [True, True, False, False]
    assert sent == [0, 1, 2, 3, 4]


def test_buckets_of_seconds_reach_from_5_ms_to_120_s() -> None:
    for histogram in HISTOGRAMS:
        assert list(histogram.buckets) == sorted(set(histogram.buckets))
        if histogram.name.endswith("_seconds"):
            assert (histogram.buckets[0], histogram.buckets[-1]) == (0.005, 120)
            steps = zip(histogram.buckets, histogram.buckets[1:], strict=False)
            assert max(high / low for low, high in steps) <= 2
