"""Computes the latencies of one request. Times are seconds.

A request is sent when the client hands it to gRPC. Its arrivals are (t_j, k_j), j = 1 .. m: a delta of k_j > 0 tokens
arrives at t_j. The server sends tokens that are ready together in one delta. A request ends with its last response.
"""

from __future__ import annotations

from nvlm_trt.benchmark.record import Record


def ttft(record: Record) -> float | None:
    """Returns the time to first token: t_1 - sent. None without a token."""
    return record.arrivals[0][0] - record.sent if record.arrivals else None


def token_intervals(record: Record) -> list[float]:
    """Returns inter-token latencies: each of the k_j tokens of delta j > 1 counts as (t_j - t_{j-1}) / k_j.

    The server makes the tokens of one delta one after the other, after the delta before. The intervals add up to the
    time that a reader waits. The tokens of the first delta have no interval: TTFT covers their time.
    """
    intervals = []
    for (before, _), (when, count) in zip(record.arrivals, record.arrivals[1:], strict=False):
        intervals += [(when - before) / count] * count
    return intervals


def mean_interval(record: Record) -> float | None:
    """Returns the time per output token: (t_m - t_1) / (k_2 + ... + k_m). None with a single delta."""
    intervals = token_intervals(record)
    return (record.arrivals[-1][0] - record.arrivals[0][0]) / len(intervals) if intervals else None


def end_to_end(record: Record) -> float:
    """Returns ended - sent."""
    return record.ended - record.sent


def send_lag(record: Record) -> float | None:
    """Returns sent - due: how late the client was. None if the load set no time."""
    return None if record.due is None else record.sent - record.due
