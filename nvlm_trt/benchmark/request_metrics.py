"""Computes the latencies of one request. Times are seconds.

A request is sent when the client hands it to gRPC. Its arrivals are (t_j, k_j), j = 1 .. m: at t_j came a delta of
k_j > 0 tokens; the server sends tokens that are ready together in one delta. It is ended when the last response came.
"""

from __future__ import annotations

from nvlm_trt.benchmark.record import Record


def ttft(record: Record) -> float | None:
    """Time to first token: t_1 - sent. None without a token."""
    return record.arrivals[0][0] - record.sent if record.arrivals else None


def token_intervals(record: Record) -> list[float]:
    """Inter-token latencies: each of the k_j tokens of delta j > 1 counts as (t_j - t_{j-1}) / k_j.

    The server makes the tokens of one delta one after the other, after the delta before: their sum is the time that a
    reader waits. The tokens of the first delta have no interval: TTFT covers the time in which they were made.
    """
    intervals = []
    for (before, _), (when, count) in zip(record.arrivals, record.arrivals[1:], strict=False):
        intervals += [(when - before) / count] * count
    return intervals


def mean_interval(record: Record) -> float | None:
    """Time per output token of a request: (t_m - t_1) / (k_2 + ... + k_m). None with a single delta."""
    intervals = token_intervals(record)
    return (record.arrivals[-1][0] - record.arrivals[0][0]) / len(intervals) if intervals else None


def end_to_end(record: Record) -> float:
    """ended - sent."""
    return record.ended - record.sent


def send_lag(record: Record) -> float | None:
    """sent - due: how late the client was. None if the load set no time."""
    return None if record.due is None else record.sent - record.due
