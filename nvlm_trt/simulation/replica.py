"""Simulates one replica: one engine with its queue, its scheduler and its vision encoder."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass

from nvlm_trt.api import Delta, SamplingParams
from nvlm_trt.backends.base import ImageFeatures
from nvlm_trt.benchmark.record import Record
from nvlm_trt.errors import QueueFullError
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.prompt.image_tokens import count_image_tokens
from nvlm_trt.prompt.tokenizer import Tokenizer, write_byte_tokenizer
from nvlm_trt.runtime.request import Request
from nvlm_trt.runtime.scheduler import Scheduler
from nvlm_trt.runtime.text_generator import GeneratorOptions
from nvlm_trt.simulation.backend import Shape, SimulatedBackend
from nvlm_trt.simulation.processor import Processor
from nvlm_trt.simulation.step_seconds import StepSeconds
from nvlm_trt.simulation.traffic import Ask, Traffic


@dataclass(frozen=True)
class Replica:
    """An engine of `design` whose steps take `steps`."""

    design: EngineDesign
    steps: StepSeconds
    max_queue: int = GeneratorOptions.max_queue

    def answer(self, traffic: Traffic, rate: float) -> list[Record]:
        """Answer all requests, on average `rate` per second. Return their records, on the simulated clock."""
        return _Run(self, traffic).answer(rate)


class _Run:
    """One simulation of a replica."""

    def __init__(self, replica: Replica, traffic: Traffic) -> None:
        self._design, self._steps, self._traffic = replica.design, replica.steps, traffic
        tokenizer = simulated_tokenizer(replica.design.config.max_tiles)
        self._processor = Processor(replica.steps.overlap)
        self._backend = SimulatedBackend(
            replica.design.config, replica.design.limits, tokenizer.image_token_id, replica.steps, self._processor
        )
        self._scheduler = Scheduler(self._backend, tokenizer, replica.max_queue, replica.steps.chunk_size)
        self._images = simulated_images(replica.design, traffic.tiles)
        self._records: list[Record] = []

    def answer(self, rate: float) -> list[Record]:
        for ask in self._traffic.asks(rate):
            self._processor.at(ask.at, functools.partial(self._arrive, ask))
        running = True
        while running:
            if self._scheduler.has_work:
                self._scheduler.step()
            else:
                running = self._processor.wait()
        return self._records

    def _arrive(self, ask: Ask) -> None:
        images = int(self._traffic.tiles > 0)
        record = Record(
            len(self._records), ask.output_tokens, images, self._processor.now, due=ask.at, warmup=ask.warmup
        )
        self._records.append(record)
        sampling = SamplingParams(max_tokens=ask.output_tokens, ignore_eos=True)
        request = Request(sampling, functools.partial(self._note, record), functools.partial(_fail, record))
        try:
            self._scheduler.enqueue(request)
        except QueueFullError as error:
            record.status, record.error, record.ended = "rejected", str(error), self._processor.now
            return
        prompt = self._traffic.prompt(self._backend.config, self._design.tag_length, ask)
        if not images:
            request.provide(prompt)
            return
        provide = functools.partial(request.provide, prompt, self._images)
        self._processor.encode(self._steps.encode(self._traffic.tiles), provide)

    def _note(self, record: Record, delta: Delta) -> None:
        now = self._processor.now
        if delta.token_ids:
            record.arrivals.append((now, len(delta.token_ids)))
        if delta.finish_reason:
            record.status, record.ended = "ok", now


def _fail(record: Record, error: Exception) -> None:
    record.status, record.error = "failed", str(error)


def simulated_images(design: EngineDesign, tiles: int) -> list[ImageFeatures]:
    """Return the one image of a request, of `tiles` tiles; none for 0."""
    if not tiles:
        return []
    config = design.config
    in_llm, cross_tokens = count_image_tokens(config, tiles, design.tag_length)
    crossed = (len(config.cross_layers), 2, config.llm.num_kv_heads, cross_tokens, config.llm.head_dim)
    embeddings = Shape((in_llm, config.llm.hidden_size))
    return [ImageFeatures(embeddings, Shape(crossed) if cross_tokens else None, tiles)]


@functools.lru_cache
def simulated_tokenizer(max_tiles: int) -> Tokenizer:
    """Return a tokenizer of bytes: texts are shown while they are simulated, and nobody reads them."""
    with tempfile.TemporaryDirectory() as directory:
        write_byte_tokenizer(directory, max_tiles)
        return Tokenizer.from_directory(directory)
