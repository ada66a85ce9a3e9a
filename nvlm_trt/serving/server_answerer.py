"""Asks the samples of an evaluation to a served engine over gRPC."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from types import TracebackType

from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import QueueFullError, ServerError
from nvlm_trt.evaluation.answerers import Answers, ModelIdentity, answer_concurrently, whole_text
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.served_engine import find_served_engine

_CONCURRENCY = 8
_QUEUE_RETRY_SECONDS = 0.5
_QUEUE_RETRIES = 240  # two minutes


class ServerAnswerer:
    """Implements `Answerer` by asking a server. Connects when its context is entered."""

    def __init__(self, url: str, max_tokens: int, concurrency: int | None = None) -> None:
        """Find out which engine is served. Raises ServerError if no server of an nvlm-trt engine is at `url`."""
        self.identity = _served_model(url)
        self._url = url
        self._sampling = SamplingParams(max_tokens=max_tokens)
        self._concurrency = concurrency or _CONCURRENCY

    def __enter__(self) -> ServerAnswerer:
        self._client = Client(self._url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def answers(self, samples: Iterable[Sample]) -> Answers:
        return answer_concurrently(self._ask, samples, self._concurrency)

    def _ask(self, sample: Sample) -> str:
        for _ in range(_QUEUE_RETRIES):
            try:
                stream = self._client.stream(sample.prompt, images=tuple(sample.images), sampling=self._sampling)
                return whole_text(stream, ServerError(f"{self._url} ended an answer early; see what the server says"))
            except QueueFullError:  # other clients use the server too
                time.sleep(_QUEUE_RETRY_SECONDS)
        raise QueueFullError(f"the queue of {self._url} stays full; try again later, or with a lower --concurrency")


def _served_model(url: str) -> ModelIdentity:
    """Identify the served engine by the digest that the server reports, and that of an earlier nvlm-trt by its path."""
    served = find_served_engine(url)
    if served.record is not None:
        return ModelIdentity("server", served.record.model, served.record.digest)
    return ModelIdentity("server", served.path, hashlib.sha256(served.path.encode()).hexdigest())
