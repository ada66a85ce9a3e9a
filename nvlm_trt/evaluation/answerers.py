"""Who answers: an engine in this process, a served one through Triton, or the PyTorch reference. All greedily."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from nvlm_trt.api import Delta, Message, SamplingParams
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, ImageError, NvlmError, QueueFullError, RequestError, ServerError
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.extras import require
from nvlm_trt.serving.triton.repository import available_cores

Answers = Iterator[tuple[Sample, str]]

_SERVER_CONCURRENCY = 8
_QUEUE_RETRY_SECONDS = 0.5
_QUEUE_RETRIES = 240  # two minutes


@dataclass(frozen=True)
class ModelIdentity:
    """Whose answers a results file holds: another source or digest is another model."""

    source: Literal["engine", "server", "reference"]
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} ({self.source}, digest {self.digest[:12]})"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class Answerer(Protocol):
    """A context manager; its model is checked when it is made and loaded when it is entered."""

    identity: ModelIdentity

    def __enter__(self) -> Answerer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def answers(self, samples: Iterable[Sample]) -> Answers:
        """Every sample with its answer, in the order in which they are finished.

        After a failure nothing new is asked; what is finished by then is yielded first, then the error is raised.
        """
        ...


class EngineAnswerer:
    """An engine in this process."""

    def __init__(self, path: Path, max_tokens: int, concurrency: int | None = None) -> None:
        """By default as many requests run at once as the engine has slots."""
        engine = Engine.open(path)
        self.identity = ModelIdentity("engine", engine.config.name, engine.digest)
        self._path = path
        self._sampling = SamplingParams(max_tokens=max_tokens)
        self._concurrency = concurrency or engine.limits.max_slots

    def __enter__(self) -> EngineAnswerer:
        from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

        self._pipeline = Pipeline.open(self._path, options=RuntimeOptions(max_queue=self._concurrency))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipeline.close(drain=False)  # what still runs was not waited for

    def answers(self, samples: Iterable[Sample]) -> Answers:
        return _answer_concurrently(self._ask, samples, self._concurrency)

    def _ask(self, sample: Sample) -> str:
        from nvlm_trt.api import ChatRequest

        request = ChatRequest([Message("user", sample.prompt)], tuple(sample.images), self._sampling)
        with contextlib.closing(self._pipeline.generate(request)) as stream:  # type: ignore[type-var]  # a generator
            return _whole_text(stream, EngineError("the engine was closed during an answer; run it again"))


class ServerAnswerer:
    """A served engine, asked over gRPC."""

    def __init__(self, url: str, max_tokens: int, concurrency: int | None = None) -> None:
        """Raises ServerError if there is no server at `url` or it serves something else."""
        self.identity = _served_model(url)
        self._url = url
        self._sampling = SamplingParams(max_tokens=max_tokens)
        self._concurrency = concurrency or _SERVER_CONCURRENCY

    def __enter__(self) -> ServerAnswerer:
        from nvlm_trt.serving.client import Client

        self._client = Client(self._url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def answers(self, samples: Iterable[Sample]) -> Answers:
        return _answer_concurrently(self._ask, samples, self._concurrency)

    def _ask(self, sample: Sample) -> str:
        for _ in range(_QUEUE_RETRIES):
            try:
                stream = self._client.stream(sample.prompt, images=tuple(sample.images), sampling=self._sampling)
                return _whole_text(stream, ServerError(f"{self._url} ended an answer early; see what the server says"))
            except QueueFullError:  # others use the server too
                time.sleep(_QUEUE_RETRY_SECONDS)
        raise QueueFullError(f"the queue of {self._url} stays full; try again later, or with a lower --concurrency")


class ReferenceAnswerer:
    """The PyTorch oracle: prompts and stop tokens are those of the engines."""

    def __init__(self, checkpoint: Path, max_tokens: int, concurrency: int | None = None) -> None:
        """By default as many samples run at once as there are cores, each on one thread."""
        require("reference", "the PyTorch reference")
        import torch

        with Checkpoint.open(checkpoint) as source:
            self.identity = ModelIdentity("reference", source.config.name, source.digest)
        self._checkpoint = checkpoint
        self._max_tokens = max_tokens
        self._concurrency = concurrency or available_cores()
        self._threads = torch.get_num_threads()

    def __enter__(self) -> ReferenceAnswerer:
        import torch

        from nvlm_trt.evaluation.reference_answer import ReferenceAnswer

        # a token of one sample is too little work to share: on two busy cores 1.5 s with two threads, 0.2 s with one
        torch.set_num_threads(1)
        self._ask = ReferenceAnswer(self._checkpoint, self._max_tokens)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        del self._ask  # the weights
        torch.set_num_threads(self._threads)

    def answers(self, samples: Iterable[Sample]) -> Answers:
        return _answer_concurrently(self._ask, samples, self._concurrency)


def _whole_text(stream: Iterable[Delta], cut_short: NvlmError) -> str:
    """Raises `cut_short` for an answer that ends before its end: part of an answer must not be scored."""
    text, finish_reason = "", None
    for delta in stream:
        text += delta.text
        finish_reason = delta.finish_reason
    if finish_reason not in ("stop", "length"):
        raise cut_short
    return text


def _answer_concurrently(ask: Callable[[Sample], str], samples: Iterable[Sample], concurrency: int) -> Answers:
    """See `Answerer.answers`; the pictures of at most `concurrency` samples are in memory."""
    waiting = iter(samples)
    running: dict[Future[str], Sample] = {}
    failure: BaseException | None = None
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="nvlm-eval")
    try:
        while True:
            if failure is None:
                for sample in itertools.islice(waiting, concurrency - len(running)):
                    running[pool.submit(_ask_by_name, ask, sample)] = sample
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                sample = running.pop(future)
                if error := future.exception():
                    failure = failure or error
                else:
                    yield sample, future.result()
        if failure:
            raise failure
    finally:
        # whoever interrupts this closes the model next, which ends the calls under way
        pool.shutdown(wait=False, cancel_futures=True)


def _ask_by_name(ask: Callable[[Sample], str], sample: Sample) -> str:
    try:
        return ask(sample)
    except (RequestError, ImageError) as error:
        raise type(error)(f"sample {sample.name}: {error}") from None


def _served_model(url: str) -> ModelIdentity:
    """The server says which engine directory it serves; where that is on this machine, its digest is the model's.

    Elsewhere the path stands for it: an engine that is rebuilt there under the same name is not told apart.
    """
    from nvlm_trt.serving.served_engine import find_served_engine

    served = find_served_engine(url)
    if served.engine is not None:
        return ModelIdentity("server", served.engine.config.name, served.engine.digest)
    return ModelIdentity("server", served.path, hashlib.sha256(served.path.encode()).hexdigest())
