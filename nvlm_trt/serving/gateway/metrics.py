"""Counts what the gateway does, for Prometheus. What the engine does, Triton's metrics tell."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nvlm_trt.api import Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class GatewayMetrics:
    """The metrics of one gateway."""

    def __init__(self, open_requests: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nvlm_gateway_requests", "Answered requests, by path and status", ["path", "status"], registry=registry
        )
        Gauge("nvlm_gateway_open_requests", "Requests that are not answered", registry=registry).set_function(
            open_requests
        )
        self.unanswered = Counter(
            "nvlm_gateway_unanswered_requests",
            "Completions without a whole answer: refused by the engine, failed, or left by their client",
            registry=registry,
        )
        self.first_event = Histogram(
            "nvlm_gateway_first_delta_seconds",
            "From the arrival of a request to the first delta of its answer",
            buckets=_SECONDS,
            registry=registry,
        )
        self._prompt_tokens = Counter("nvlm_gateway_prompt_tokens", "Tokens of answered prompts", registry=registry)
        self._completion_tokens = Counter("nvlm_gateway_completion_tokens", "Tokens of answers", registry=registry)
        self._image_tiles = Counter("nvlm_gateway_image_tiles", "Tiles of answered prompts", registry=registry)

    def add_usage(self, usage: Usage) -> None:
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._completion_tokens.inc(usage.completion_tokens)
        self._image_tiles.inc(usage.image_tiles)

    def page(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)
