"""Answers the samples of an evaluation by an engine in this process or by the PyTorch reference, both greedily.

`nvlm_trt.serving.server_answerer` has a third answerer, for a served engine.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol

from nvlm_trt.api import Delta, Message, SamplingParams
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, ImageError, NvlmError, RequestError
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.extras import require
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.machine import available_cores

if TYPE_CHECKING:
    from nvlm_trt.runtime.pipeline import EncodeTiles

Answers = Iterator[tuple[Sample, str]]


@dataclass(frozen=True)
class ModelIdentity:
    """Identifies the model that gave the answers of a results file: another source or digest is another model."""

    source: Literal["engine", "server", "reference"]
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} ({self.source}, digest {self.digest[:12]})"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class Answerer(Protocol):
    """Answers samples. The constructor checks the model; the context manager loads the model when it is entered."""

    identity: ModelIdentity

    def __enter__(self) -> Answerer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def answers(self, samples: Iterable[Sample]) -> Answers:
        """Yields every sample with its answer, in the order in which they are finished.

        Asks nothing new after a failure: yields the answers that are finished by then, then raises the error.
        """
        ...


class EngineAnswerer:
    """Answers by an engine in this process."""

    def __init__(
        self,
        path: Path,
        max_tokens: int,
        concurrency: int | None = None,
        limits: ImageLimits | None = None,
        encode_tiles: EncodeTiles | None = None,
    ) -> None:
        """Runs `concurrency` requests at once, by default as many as the engine has slots. `encode_tiles` replaces the
        engine's vision encoder."""
        engine = Engine.open(path)
        self.identity = ModelIdentity("engine", engine.config.name, engine.digest)
        self._path = path
        self._sampling = SamplingParams(max_tokens=max_tokens)
        self._concurrency = concurrency or engine.limits.max_slots
        self._image_limits = limits or ImageLimits()
        self._encode_tiles = encode_tiles

    def __enter__(self) -> EngineAnswerer:
        from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

        options = RuntimeOptions(max_queue=self._concurrency, image_limits=self._image_limits)
        self._pipeline = Pipeline.open(self._path, encode_tiles=self._encode_tiles, options=options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipeline.close(drain=False)  # nobody waits for the requests that still run

    def answers(self, samples: Iterable[Sample]) -> Answers:
        return answer_concurrently(self._ask, samples, self._concurrency)

    def _ask(self, sample: Sample) -> str:
        from nvlm_trt.api import ChatRequest

        request = ChatRequest([Message("user", sample.prompt)], tuple(sample.images), self._sampling)
        with contextlib.closing(self._pipeline.generate(request)) as stream:  # type: ignore[type-var]  # a generator
            return whole_text(stream, EngineError("the engine was closed during an answer; run it again"))


class ReferenceAnswerer:
    """Answers by the PyTorch reference, with the prompts and stop tokens of the engines."""

    def __init__(
        self, checkpoint: Path, max_tokens: int, concurrency: int | None = None, lora: Path | None = None
    ) -> None:
        """Runs `concurrency` samples at once, each on one thread, by default as many as there are cores. `lora`: an
        adapter that is merged into the checkpoint's weights."""
        require("reference", "the PyTorch reference")
        import torch

        with Checkpoint.open(checkpoint, lora) as source:
            self.identity = ModelIdentity("reference", source.config.name, source.digest)
        self._checkpoint, self._lora = checkpoint, lora
        self._max_tokens = max_tokens
        self._concurrency = concurrency or available_cores()
        self._threads = torch.get_num_threads()

    def __enter__(self) -> ReferenceAnswerer:
        import torch

        from nvlm_trt.evaluation.reference_answer import ReferenceAnswer

        # a token of one sample is too little work for two threads: on two busy cores 1.5 s, with one thread 0.2 s
        torch.set_num_threads(1)
        self._ask = ReferenceAnswer(self._checkpoint, self._max_tokens, self._lora)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        del self._ask  # the weights
        torch.set_num_threads(self._threads)

    def answers(self, samples: Iterable[Sample]) -> Answers:
        return answer_concurrently(self._ask, samples, self._concurrency)


def whole_text(stream: Iterable[Delta], cut_short: NvlmError) -> str:
    """Joins the text of an answer. Raises `cut_short` if the answer is incomplete, because it must not be scored."""
    text, finish_reason = "", None
    for delta in stream:
        text += delta.text
        finish_reason = delta.finish_reason
    if finish_reason not in ("stop", "length"):
        raise cut_short
    return text


def answer_concurrently(ask: Callable[[Sample], str], samples: Iterable[Sample], concurrency: int) -> Answers:
    """Implements `Answerer.answers`. Holds the images of at most `concurrency` samples in memory."""
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
        # the caller closes the model next, which ends the calls that still run
        pool.shutdown(wait=False, cancel_futures=True)


def _ask_by_name(ask: Callable[[Sample], str], sample: Sample) -> str:
    try:
        return ask(sample)
    except (RequestError, ImageError) as error:
        raise type(error)(f"sample {sample.name}: {error}") from None
