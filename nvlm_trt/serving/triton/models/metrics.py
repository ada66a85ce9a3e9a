"""Reports the metrics of the pipeline on Triton's metrics port."""

from __future__ import annotations

import threading
from typing import Any

from nvlm_trt.runtime.pipeline import PipelineMetrics
from nvlm_trt.serving.triton.models.error_reason import REASONS, error_reason
from nvlm_trt.serving.triton.models.histograms import Observations

_DESCRIPTIONS = {
    "nvlm_active_slots": "Answers being decoded",
    "nvlm_free_slots": "Slots without an answer",
    "nvlm_queued_requests": "Requests without a slot, those whose images are being encoded included",
    "nvlm_open_requests": "Requests that are not answered to the end",
    "nvlm_image_cache_images": "Images whose features are cached",
    "nvlm_image_cache_bytes": "Bytes of cached image features",
    "nvlm_image_cache_hits_total": "Images whose features were cached",
    "nvlm_image_cache_misses_total": "Images that were tiled and encoded",
    "nvlm_kept_prompts": "Prompts of ended requests whose keys and values are kept",
    "nvlm_prompt_tokens_total": "Tokens of the prompts of requests that had a slot",
    "nvlm_cached_prompt_tokens_total": "Tokens of prompts whose keys and values were kept from earlier ones",
    "nvlm_draft_tokens_total": "Drafted tokens that were checked",
    "nvlm_accepted_draft_tokens_total": "Drafted tokens that became part of an answer",
    "nvlm_generated_tokens_total": "Tokens generated",
    "nvlm_late_tokens_total": "Tokens generated for requests after their cancellation was noticed",
    "nvlm_finished_requests_total": "Requests that ended, by reason",
    "nvlm_refused_requests_total": "Requests that were refused on arrival, by reason",
    "nvlm_failed_requests_total": "Requests that ended with an error after they were accepted, by reason",
}


class ModelMetrics:
    """Keeps one metric per name and reason. Names that end in _total are counters, the others gauges."""

    def __init__(self, pb_utils: Any) -> None:
        family = pb_utils.MetricFamily
        self._families = {
            name: family(name, text, family.COUNTER if name.endswith("_total") else family.GAUGE)
            for name, text in _DESCRIPTIONS.items()
        }
        self._metrics: dict[tuple[str, str], Any] = {}
        self._sent: dict[tuple[str, str], float] = {}
        self._late_tokens = 0
        self._refused = dict.fromkeys(REASONS, 0)
        self._failed = dict.fromkeys(REASONS, 0)
        self._lock = threading.Lock()
        self.observations = Observations(pb_utils)

    def add_late_tokens(self, tokens: int) -> None:
        with self._lock:
            self._late_tokens += tokens

    def add_refusal(self, error: Exception) -> None:
        with self._lock:
            self._refused[error_reason(error)] += 1

    def add_failure(self, error: Exception) -> None:
        with self._lock:
            self._failed[error_reason(error)] += 1

    def report(self, pipeline: PipelineMetrics, open_requests: int) -> None:
        """Send the values that have changed, and no others: every value is a round trip to the server."""
        generator, cache = pipeline.generator, pipeline.image_cache
        self._set("nvlm_active_slots", generator.active)
        self._set("nvlm_free_slots", generator.free_slots)
        self._set("nvlm_queued_requests", generator.queued)
        self._set("nvlm_image_cache_images", cache.images)
        self._set("nvlm_image_cache_bytes", cache.nbytes)
        self._set("nvlm_image_cache_hits_total", cache.hits)
        self._set("nvlm_image_cache_misses_total", cache.misses)
        self._set("nvlm_kept_prompts", generator.kept_prompts)
        self._set("nvlm_prompt_tokens_total", generator.prompt_tokens)
        self._set("nvlm_cached_prompt_tokens_total", generator.cached_tokens)
        self._set("nvlm_draft_tokens_total", generator.draft_tokens)
        self._set("nvlm_accepted_draft_tokens_total", generator.accepted_draft_tokens)
        self._set("nvlm_generated_tokens_total", generator.tokens_generated)
        self._set("nvlm_late_tokens_total", self._late_tokens)
        for reason, count in generator.requests_finished.items():
            self._set("nvlm_finished_requests_total", count, reason)
        for reason in REASONS:
            self._set("nvlm_refused_requests_total", self._refused[reason], reason)
            self._set("nvlm_failed_requests_total", self._failed[reason], reason)
        self._set("nvlm_open_requests", open_requests)

    def _set(self, name: str, value: float, reason: str = "") -> None:
        key = (name, reason)
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels={"reason": reason} if reason else {})
            self._sent[key] = 0
        if value == self._sent[key]:
            return
        if name.endswith("_total"):
            self._metrics[key].increment(value - self._sent[key])
        else:
            self._metrics[key].set(value)
        self._sent[key] = value
