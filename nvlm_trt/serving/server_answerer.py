"""The answerer of an evaluation that asks a served engine over gRPC."""

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
    """An `Answerer` that asks a server; entering it connects."""

    def __init__(self, url: str, max_tokens: int, concurrency: int | None = None) -> None:
        """Raises ServerError if there is no server at `url` or it serves something else."""
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
            except QueueFullError:  # others use the server too
                time.sleep(_QUEUE_RETRY_SECONDS)
        raise QueueFullError(f"the queue of {self._url} stays full; try again later, or with a lower --concurrency")


def _served_model(url: str) -> ModelIdentity:
    """Asks the server for its engine directory; uses the engine's digest if that directory is on this machine.

    Elsewhere the path is the identity, which an engine that is rebuilt there under the same name keeps."""
    served = find_served_engine(url)
    if served.engine is not None:
        return ModelIdentity("server", served.engine.config.name, served.engine.digest)
    return ModelIdentity("server", served.path, hashlib.sha256(served.path.encode()).hexdigest())
