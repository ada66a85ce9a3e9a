"""Compares the simulation behind `nvlm-trt plan --fleet` with the running batcher: latencies under the same requests.

    python -m lab.fleet_simulation --work WORK --publish

Two systems: `sleeping`, a batcher whose steps sleep for planned times, which checks the simulated queue, scheduler and
threads on a machine that is not quiet, too; and an engine of a random checkpoint. The step times of both are measured
first; the engine's are written to WORK/step_times.json, which `nvlm-trt plan ENGINE --fleet RATE --step-times FILE`
reads. Each gets requests at the times of a Poisson process, once for each of `--loads`: shares of the requests per
second that the simulation says it answers at most. The simulated batcher gets the same requests at the same times.
`simulated` is the simulated latency over the real one.
"""

from __future__ import annotations

import argparse
import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.common import parser, run
from lab.engines import random_engine
from lab.rounds import Contender, Rounds
from nvlm_trt.api import Delta, SamplingParams
from nvlm_trt.backends.base import BackendArray, FloatArray, ImageFeatures, StepBackend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.table import find_backend
from nvlm_trt.benchmark.metrics import Metrics, summarize
from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.workload import Lengths
from nvlm_trt.engine import Engine
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.gpus import GPUS
from nvlm_trt.planner.limits import engine_limits
from nvlm_trt.planner.step_times import DeviceTimes
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.batcher import Batcher
from nvlm_trt.runtime.request import Request
from nvlm_trt.simulation.backend import Shape, SimulatedBackend
from nvlm_trt.simulation.measurement import measure_backend, measure_steps
from nvlm_trt.simulation.replica import Replica, simulated_tokenizer
from nvlm_trt.simulation.step_seconds import PlannedSteps
from nvlm_trt.simulation.traffic import Ask, Traffic

RESULT = "fleet_simulation.json"
STEP_TIMES = "step_times.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "openvino", "numpy")
TAG_LENGTH = 1  # tokens of a tile tag in the tokenizer of a random checkpoint
UNLIMITED = 1e4  # requests per second: all come at once


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precision", default="int8-weight-only")
    made.add_argument("--kinds", nargs="+", choices=list(_KINDS), default=list(_KINDS))
    made.add_argument("--engine", type=Path, help="instead of a random one of --preset")
    made.add_argument("--faster", type=float, default=1, help="sleeping steps take so many times less")
    made.add_argument("--requests", type=int, default=60)
    made.add_argument("--tiles", type=int, default=1)
    made.add_argument("--text-tokens", default="32:256")
    made.add_argument("--output-tokens", default="16:64")
    made.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    traffic = Traffic(
        Lengths.parse(arguments.text_tokens, "--text-tokens"),
        Lengths.parse(arguments.output_tokens, "--output-tokens"),
        arguments.tiles,
        arguments.requests,
    )
    systems = [_KINDS[kind](arguments, traffic) for kind in arguments.kinds]
    contenders = {
        f"{system.name}, load {share:g}": contender(system, traffic, share)
        for system in systems
        for share in arguments.loads
    }
    rounds.run(contenders, arguments.rounds, warm_up=False)
    rounds.report(systems={system.name: system.about for system in systems})


@dataclass(frozen=True)
class System:
    """A batcher that runs, and the replica that simulates it."""

    name: str
    replica: Replica
    tokenizer: Tokenizer
    open: Callable[[], StepBackend]
    about: dict[str, Any]  # for the record


def sleeping(arguments: argparse.Namespace, traffic: Traffic) -> System:
    """A batcher over steps that sleep: its threads, its queue and its scheduler are real, its times are known."""
    spec, config = find_backend("tensorrt"), PRESETS["nvlm-d-72b"]
    limits = engine_limits(config, TAG_LENGTH, {})
    design = EngineDesign(config, limits, spec.precisions.parse("fp8"), spec, TAG_LENGTH)
    gpu = GPUS["h200"]
    faster = arguments.faster
    times = DeviceTimes(design, gpu.bandwidth.value * faster, lambda precision: gpu.rate(precision) * faster)
    slept = PlannedSteps(times)
    tokenizer = simulated_tokenizer(config.max_tiles)

    def open_sleeping() -> StepBackend:
        return SleepingBackend(config, limits, tokenizer.image_token_id, slept, Sleep())

    with open_sleeping() as backend:
        steps = measure_backend(backend, tokenizer, design, traffic.tiles)
    about = {"sleeps": "as long as is planned for nvlm-d-72b in fp8 on an H200", **steps.model_dump()}
    return System("sleeping", Replica(design, steps, arguments.requests), tokenizer, open_sleeping, about)


class SleepingBackend(SimulatedBackend):
    """Encodes images, too, by sleeping."""

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        time.sleep(self._steps.encode(len(pixel_values)))
        return Shape((len(pixel_values), self.config.tokens_per_tile, self.config.llm.hidden_size))

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        tiles, tokens, hidden = image_tokens.shape
        return ImageFeatures(Shape((tiles * tokens, hidden)), None, tiles)


class Sleep:
    """A clock on which time passes by itself."""

    def step(self, seconds: float) -> None:
        time.sleep(seconds)


def measured(arguments: argparse.Namespace, traffic: Traffic) -> System:
    """An engine of this machine, and its measured step times, which are written to WORK."""
    engine = (
        Engine.open(arguments.engine)
        if arguments.engine
        else random_engine(arguments.work, arguments.preset, arguments.precision)
    )
    steps = measure_steps(engine, TAG_LENGTH, traffic.tiles, arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / STEP_TIMES).write_text(steps.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return System(
        engine.manifest.model_name,
        Replica(EngineDesign.of(engine, TAG_LENGTH), steps, arguments.requests),
        Tokenizer.from_directory(engine.path),
        lambda: open_backend(engine, threads=arguments.threads),
        steps.model_dump(),
    )


_KINDS = {"sleeping": sleeping, "engine": measured}


def contender(system: System, traffic: Traffic, share: float) -> Contender:
    def run_both() -> Mapping[str, float]:
        most = summarize(system.replica.answer(traffic, UNLIMITED)).requests_per_s
        assert most is not None, "the simulated engine answers"
        simulated = latencies(summarize(system.replica.answer(traffic, share * most)))
        real = latencies(summarize(serve(system, traffic, share * most)))
        values = {"requests/s": share * most}
        for name, seconds in real.items():
            values |= {f"{name} ms": 1e3 * seconds, f"{name} simulated": simulated[name] / seconds}
        return values

    return run_both


def latencies(metrics: Metrics) -> dict[str, float]:
    assert metrics.ttft_s, "a request was answered"
    assert metrics.itl_s, "a request was answered"
    assert metrics.e2e_s, "a request was answered"
    return {
        "TTFT mean": metrics.ttft_s.mean,
        "TTFT p50": metrics.ttft_s.p50,
        "TTFT p90": metrics.ttft_s.p90,
        "token mean": metrics.itl_s.mean,
        "token p50": metrics.itl_s.p50,
        "token p90": metrics.itl_s.p90,
        "end to end mean": metrics.e2e_s.mean,
        "end to end p50": metrics.e2e_s.p50,
        "end to end p90": metrics.e2e_s.p90,
    }


def serve(system: System, traffic: Traffic, rate: float) -> list[Record]:
    """Sends the requests to a batcher in this process. One thread encodes their images."""
    backend, design = system.open(), system.replica.design
    batcher = Batcher(backend, system.tokenizer, traffic.requests, design.backend.prefill_chunk)
    edge = design.config.vision.image_size
    pixels = np.zeros((traffic.tiles, 3, edge, edge), np.float32)
    records: list[Record] = []
    waiting: queue.SimpleQueue[tuple[Ask, Request] | None] = queue.SimpleQueue()

    def encode() -> None:
        while entry := waiting.get():
            ask, request = entry
            images = [batcher.features(batcher.encode(pixels))] if traffic.tiles else []
            request.provide(traffic.prompt(backend.config, design.tag_length, ask), images)

    encoder = threading.Thread(target=encode)
    if traffic.tiles:
        batcher.encode(pixels)  # the first run of a shape prepares it
    encoder.start()
    start = time.monotonic()
    for ask in traffic.asks(rate):
        time.sleep(max(0.0, start + ask.at - time.monotonic()))
        record = Record(len(records), ask.output_tokens, 1, time.monotonic(), start + ask.at, warmup=ask.warmup)
        records.append(record)
        request = Request(
            SamplingParams(max_tokens=ask.output_tokens, ignore_eos=True),
            functools.partial(note, record),
            functools.partial(fail, record),
        )
        batcher.submit(request)
        waiting.put((ask, request))
    waiting.put(None)
    encoder.join()
    batcher.close()
    return records


def note(record: Record, delta: Delta) -> None:
    now = time.monotonic()
    if delta.token_ids:
        record.arrivals.append((now, len(delta.token_ids)))
    if delta.finish_reason:
        record.status, record.ended = "ok", now


def fail(record: Record, error: Exception) -> None:
    record.status, record.error = "failed", str(error)


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
