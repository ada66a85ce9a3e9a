"""Measures the step times of an engine on this machine, by running the real scheduler step by step."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nvlm_trt.api import SamplingParams
from nvlm_trt.backends.base import BackendArray, ImageFeatures, StepBackend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.benchmark.machine import machine
from nvlm_trt.benchmark.workload import Lengths
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.scheduler import Scheduler
from nvlm_trt.simulation.step_seconds import Line, MeasuredSteps, Overlap
from nvlm_trt.simulation.traffic import Ask, Traffic

_STEPS = 24  # decoding steps
_IMAGES = 3
_REPEATS = 3  # of each prompt
_OUTPUT = 2 * _STEPS  # tokens of an answer that is long enough for every measurement
_TEXT = (4, 0.03, 0.08, 0.2)  # text tokens: a number, then shares of the context


def measure_steps(
    engine: Engine, tag_length: int, tiles: int, threads: int | None = None, progress: Progress = no_progress
) -> MeasuredSteps:
    """Measure the steps of requests with an image of `tiles` tiles (0: none). Nothing else should run meanwhile.

    Raises EngineError for an engine that does not run here, or that batches by itself."""
    design = EngineDesign.of(engine, tag_length)
    with open_backend(engine, threads=threads) as backend:
        return measure_backend(backend, Tokenizer.from_directory(engine.path), design, tiles, progress)


def measure_backend(
    backend: StepBackend,
    tokenizer: Tokenizer,
    design: EngineDesign,
    tiles: int,
    progress: Progress = no_progress,
) -> MeasuredSteps:
    """Measure the steps of an open backend as `measure_steps` does."""
    steps = _Steps(backend, tokenizer, design, tiles)
    encoder = steps.encoder(progress)
    prompt, cached = steps.prompts(progress)
    return MeasuredSteps(
        engine=design.config.name,
        machine=machine()["cpu"],
        chunk_size=steps.chunk_size,
        encoder=encoder,
        prompt=prompt,
        cached=cached,
        token=steps.tokens(progress),
        overlap=steps.overlap(progress),
    )


class _Steps:
    """Runs requests that all have the same image, or none."""

    def __init__(self, backend: StepBackend, tokenizer: Tokenizer, design: EngineDesign, tiles: int) -> None:
        self.chunk_size = design.backend.prefill_chunk
        self._backend, self._design, self._tiles = backend, design, tiles
        # prompts are not reused: the same image in all of them is no sign that they begin alike
        self._scheduler = Scheduler(backend, tokenizer, design.limits.max_slots, self.chunk_size, reuse_prompts=False)
        self._rng = np.random.default_rng(0)
        self._images: list[ImageFeatures] = []

    def encoder(self, progress: Progress) -> Line:
        if not self._tiles:
            return Line(base=0, slope=0)
        seconds = {}
        for tiles in sorted({1, self._tiles}):
            progress(f"encoding {tiles} tiles", 0, 1)
            self._encode(tiles)  # the first run of a shape prepares it
            seconds[tiles] = self._seconds_of_image(tiles)
        self._images = [self._encode(self._tiles)]
        return _line(seconds)

    def prompts(self, progress: Progress) -> tuple[Line, float]:
        """Return the line of a chunk's tokens, and the seconds per token and token cached before it."""
        progress("reading prompts", 0, 1)
        rows, seconds = [], []
        for text_tokens in self._texts() * _REPEATS:
            request = self._submit(text_tokens, max_tokens=1)
            while not self._scheduler.is_empty:
                position = request.cached
                seconds.append(_timed(self._scheduler.step))
                tokens = request.cached - position
                rows.append([1, tokens, tokens * position])
        base, slope, cached = _fit(np.array(rows, float), np.array(seconds))
        return Line(base=base, slope=slope), cached

    def tokens(self, progress: Progress) -> dict[int, Line]:
        slots = self._design.limits.max_slots
        counts = sorted({*(2**power for power in range(slots.bit_length()) if 2**power < slots), slots})
        texts = self._texts()
        lines = {}
        for count in counts:
            progress(f"decoding {count} requests", 0, 1)
            lines[count] = _line(dict(self._decode(count, text) for text in (texts[0], texts[-2])))
        return lines

    def overlap(self, progress: Progress) -> Overlap:
        """Compare steps beside an encoder that is always busy, and images beside steps, with each alone."""
        if not self._tiles:
            return Overlap(step=1, encode=1)
        progress("encoding and decoding", 0, 1)
        count, text = max(1, self._design.limits.max_slots // 2), self._texts()[0]
        _, alone = self._decode(count, text)
        encoded_alone = self._seconds_of_image(self._tiles)
        seconds: list[float] = []
        stop = threading.Event()

        def encode() -> None:
            while not stop.is_set():
                seconds.append(_timed(lambda: self._encode(self._tiles)))

        self._start(count, text)
        thread = threading.Thread(target=encode)
        thread.start()
        together = [_timed(self._scheduler.step) for _ in range(_STEPS)]
        while len(seconds) < _IMAGES and thread.is_alive():
            if self._scheduler.is_empty:
                self._start(count, text)
            self._scheduler.step()
        stop.set()
        thread.join()
        self._end()
        encoded = statistics.median(seconds[:_IMAGES] or [encoded_alone])
        return Overlap(step=max(1.0, _middle(together) / alone), encode=max(1.0, encoded / encoded_alone))

    def _decode(self, count: int, text_tokens: int) -> tuple[float, float]:
        """Return the tokens cached in each of `count` sequences, on average, and the seconds of a decoding step."""
        requests = self._start(count, text_tokens)
        seconds = [_timed(self._scheduler.step) for _ in range(_STEPS)]
        cached = requests[0].choices[0].cached - _STEPS / 2
        self._end()
        return cached, _middle(seconds)

    def _start(self, count: int, text_tokens: int) -> list[Request]:
        """Start requests, until all of them are decoded."""
        chunks = count * ((text_tokens + self._in_llm) // self.chunk_size + 2)
        requests = [self._submit(text_tokens, _OUTPUT + chunks) for _ in range(count)]
        for _ in range(chunks):
            self._scheduler.step()
            if self._scheduler.metrics().active == count:
                return requests
        limits = self._design.limits
        raise EngineError(
            f"{limits.max_slots} slots of {limits.max_seq_len} tokens are too short for a measurement of decoding; "
            "build the engine with a larger --max-seq-len"
        )

    def _end(self) -> None:
        self._scheduler.cancel_all()
        self._scheduler.step()

    def _submit(self, text_tokens: int, max_tokens: int) -> Request:
        request = Request(SamplingParams(max_tokens=max_tokens, ignore_eos=True), _ignore, _raise)
        self._scheduler.enqueue(request)
        text = Lengths(text_tokens, text_tokens)
        ask = Ask(0, self._rng.integers(0, 256, text_tokens), max_tokens, warmup=False)
        traffic = Traffic(text, Lengths(max_tokens, max_tokens), self._tiles, requests=1)
        request.provide(traffic.prompt(self._backend.config, self._design.tag_length, ask), self._images)
        return request

    @property
    def _in_llm(self) -> int:
        return sum(len(image.embeddings) for image in self._images)

    def _texts(self) -> list[int]:
        """Return numbers of text tokens, with which prompts have several numbers of chunks."""
        context = self._design.limits.max_seq_len - self._in_llm - 2 * _OUTPUT
        return sorted({max(1, round(part * (context if part < 1 else 1))) for part in _TEXT})

    def _seconds_of_image(self, tiles: int) -> float:
        return statistics.median(_timed(lambda: self._encode(tiles)) for _ in range(_IMAGES))

    def _encode(self, tiles: int) -> ImageFeatures:
        edge = self._design.config.vision.image_size
        tokens: BackendArray = self._backend.encode(np.zeros((tiles, 3, edge, edge), np.float32))
        return self._backend.features(tokens)


def _fit(rows: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Return the coefficients, none of them negative, with which rows [n, k] give `seconds` [n]; the squares of the
    relative errors are least."""
    kept = list(range(rows.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(rows[:, kept] / seconds[:, None], np.ones(len(seconds)), rcond=None)
        if found.min() >= 0 or len(kept) == 1:
            coefficients = [0.0] * rows.shape[1]
            for column, value in zip(kept, found, strict=True):
                coefficients[column] = max(float(value), 0.0)
            return coefficients
        del kept[int(found.argmin())]


def _line(points: Mapping[int, float] | Mapping[float, float]) -> Line:
    """Draw the line through one or two points, never a falling one."""
    (first, low), (last, high) = min(points.items()), max(points.items())
    slope = max(0.0, (high - low) / (last - first)) if last > first else 0.0
    return Line(base=max(0.0, low - slope * first), slope=slope)


def _middle(seconds: Sequence[float]) -> float:
    """Return the mean of the middle half: a step that another process has held up does not count."""
    quarter = len(seconds) // 4
    return statistics.fmean(sorted(seconds)[quarter : len(seconds) - quarter])


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _ignore(delta: object) -> None:
    pass


def _raise(error: Exception) -> None:
    raise error
