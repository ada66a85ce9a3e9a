"""Reads the metrics page of a server: Triton's times per model and the product's own counters."""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nvlm_trt.errors import ServerError
from nvlm_trt.serving.chat_tensors import MODEL

_HTTP_SECONDS = 5
# `nvlm` reports its counters every 0.1 s (triton_repo/nvlm/1/model.py)
_SETTLE_SECONDS = 0.25
_SETTLE_AT_MOST_SECONDS = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Triton's names do not end in _total: the parser appends _total
_REQUESTS, _ROWS, _RUNS, _TOTAL, _QUEUE, *_COMPUTE = (
    f"nv_inference_{name}_total"
    for name in (
        "request_success",
        "count",
        "exec_count",
        "request_duration_us",
        "queue_duration_us",
        "compute_input_duration_us",
        "compute_infer_duration_us",
        "compute_output_duration_us",
    )
)
# name on the page -> name in results, followed by the value of a label if there is one
_COUNTERS = {
    "nvlm_generated_tokens_total": "generated_tokens",
    "nvlm_late_tokens_total": "late_tokens",
    "nvlm_image_cache_hits_total": "image_cache_hits",
    "nvlm_image_cache_misses_total": "image_cache_misses",
    "nvlm_finished_requests_total": "finished",
}
_OPEN = "nvlm_open_requests"


@dataclass(frozen=True)
class ModelTimes:
    """Holds sums over the requests of one Triton model, in seconds. Triton does not time the answers of `nvlm`."""

    requests: int
    rows: int  # elements of all batches: for vision_encoder, tiles
    executions: int
    total_s: float
    queue_s: float
    compute_s: float  # input, inference and output

    @property
    def mean_s(self) -> float:
        """Computes the mean time of a request, from its arrival at the model to its end."""
        return self.total_s / self.requests if self.requests else 0.0

    def to_dict(self) -> dict[str, float]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class CounterSnapshot:
    """Holds the counts of a server: since its start, or between two times."""

    models: Mapping[str, ModelTimes]
    counters: Mapping[str, float]
    open_requests: int = 0

    def since(self, before: CounterSnapshot) -> CounterSnapshot | None:
        """Subtracts `before`. Returns None if a count is lower than before: the server was started anew."""
        models = {
            name: ModelTimes(*(a - b for a, b in zip(times.__dict__.values(), past, strict=True)))
            for name, times in self.models.items()
            for past in [before.models[name].__dict__.values() if name in before.models else [0] * 6]
        }
        counters = {name: value - before.counters.get(name, 0) for name, value in self.counters.items()}
        if min([*counters.values(), *(times.requests for times in models.values())], default=0) < 0:
            return None
        return CounterSnapshot(models, counters, self.open_requests)

    def to_dict(self) -> dict[str, Any]:
        models = {name: times.to_dict() for name, times in self.models.items()}
        return {"models": models, "counters": dict(self.counters)}


class TritonMetrics:
    """Reads the metrics page at one address."""

    def __init__(self, url: str) -> None:
        """Takes the page's address, http://host:port/metrics; sends nothing. Raises ServerError for another form."""
        self.url = url
        try:
            parts = urlsplit(url)
            valid = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ServerError(
                f"metrics address {url!r} is not http://host:port/metrics; use what `nvlm-trt serve` prints"
            )
        # requests to this machine must not go through the proxy that the environment names
        direct = [urllib.request.ProxyHandler({})] if parts.hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(*direct)

    def read(self) -> CounterSnapshot:
        """Reads the page. Raises ServerError if there is no page, or no page of an nvlm-trt server."""
        try:
            with self._opener.open(self.url, timeout=_HTTP_SECONDS) as response:
                page = response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            detail = " ".join(str(getattr(error, "reason", None) or error).split())
            raise ServerError(
                f"no metrics at {self.url} ({detail}); pass the --metrics-url that `nvlm-trt serve` prints"
            ) from None
        try:
            return parse(page)
        except ValueError as error:
            raise ServerError(
                f"{self.url} does not hold an nvlm-trt server's metrics ({error}); pass the --metrics-url that "
                "`nvlm-trt serve` prints"
            ) from None

    def read_settled(self) -> CounterSnapshot:
        """Reads the page until no request is open and no count changes, for 5 s at most.

        The counts then include every request that has ended.
        """
        deadline = time.monotonic() + _SETTLE_AT_MOST_SECONDS
        snapshot = self.read()
        while time.monotonic() < deadline:
            time.sleep(_SETTLE_SECONDS)
            snapshot, before = self.read(), snapshot
            if snapshot == before and not snapshot.open_requests:
                break
        return snapshot


def parse(page: str) -> CounterSnapshot:
    """Parses a page in Prometheus' text format. Raises ValueError for a page of another server."""
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[tuple[str, str], float] = {}  # (metric, model or reason) -> sum over the versions of a model
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = sample.name, sample.labels.get("model") or sample.labels.get("reason") or ""
            values[key] = values.get(key, 0.0) + float(sample.value)
    for needed in (("nvlm_generated_tokens_total", ""), (_REQUESTS, MODEL)):
        if needed not in values:
            raise ValueError(f"{needed[0]} is missing")
    models = sorted(model for name, model in values if name == _REQUESTS)
    counters = {
        f"{_COUNTERS[name]}_{label}" if label else _COUNTERS[name]: value
        for (name, label), value in sorted(values.items())
        if name in _COUNTERS
    }
    return CounterSnapshot({m: _times(values, m) for m in models}, counters, int(values.get((_OPEN, ""), 0)))


def _times(values: Mapping[tuple[str, str], float], model: str) -> ModelTimes:
    requests, rows, runs = (int(values.get((name, model), 0)) for name in (_REQUESTS, _ROWS, _RUNS))
    total, queue, *compute = (values.get((name, model), 0) / 1e6 for name in (_TOTAL, _QUEUE, *_COMPUTE))
    return ModelTimes(requests, rows, runs, total, queue, sum(compute))
