"""Compares the simulation behind `nvlm-trt plan --fleet` with the running batcher: latencies under the same requests.

    python -m lab.fleet_simulation --work WORK --publish

Measures the step times of the engine of a random checkpoint, and writes them to WORK/step_times.json, which
`nvlm-trt plan ENGINE --fleet RATE --step-times FILE` reads. Then sends the batcher requests at the times of a Poisson
process, once for each of `--loads`: shares of the requests per second that the simulation says an engine answers at
most. The simulated batcher gets the same requests at the same times. A round is one such run; contenders are the loads.
"""

from __future__ import annotations

import argparse
import functools
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lab.common import parser, run
from lab.engines import random_engine
from lab.rounds import Contender, Rounds
from nvlm_trt.api import Delta, SamplingParams
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.benchmark.metrics import Metrics, summarize
from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.workload import Lengths
from nvlm_trt.engine import Engine
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.batcher import Batcher
from nvlm_trt.runtime.request import Request
from nvlm_trt.simulation.measurement import measure_steps
from nvlm_trt.simulation.replica import Replica
from nvlm_trt.simulation.step_seconds import MeasuredSteps
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
    made.add_argument("--engine", type=Path, help="instead of a random one of --preset")
    made.add_argument("--requests", type=int, default=60)
    made.add_argument("--tiles", type=int, default=1)
    made.add_argument("--text-tokens", default="32:256")
    made.add_argument("--output-tokens", default="16:64")
    made.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    engine = (
        Engine.open(arguments.engine)
        if arguments.engine
        else random_engine(arguments.work, arguments.preset, arguments.precision)
    )
    steps = measure_steps(engine, TAG_LENGTH, arguments.tiles, arguments.threads)
    (arguments.work / STEP_TIMES).write_text(steps.model_dump_json(indent=2) + "\n", encoding="utf-8")
    traffic = Traffic(
        Lengths.parse(arguments.text_tokens, "--text-tokens"),
        Lengths.parse(arguments.output_tokens, "--output-tokens"),
        arguments.tiles,
        arguments.requests,
    )
    most = summarize(_replica(engine, steps, arguments.requests).answer(traffic, UNLIMITED)).requests_per_s
    assert most is not None, "the simulated engine answers"
    print(f"at most {most:.2f} requests/s, as simulated", file=sys.stderr, flush=True)
    contenders = {
        f"load {share:g}": contender(engine, steps, traffic, share * most, arguments.threads)
        for share in arguments.loads
    }
    rounds.run(contenders, arguments.rounds, warm_up=False)
    rounds.report(step_times=steps.model_dump(), most_requests_per_s=most)


def _replica(engine: Engine, steps: MeasuredSteps, max_queue: int) -> Replica:
    return Replica(EngineDesign.of(engine, TAG_LENGTH), steps, max_queue)


def contender(engine: Engine, steps: MeasuredSteps, traffic: Traffic, rate: float, threads: int) -> Contender:
    def measured() -> Mapping[str, float]:
        simulated = summarize(_replica(engine, steps, traffic.requests).answer(traffic, rate))
        real = summarize(serve(engine, traffic, rate, threads))
        values = {"requests/s": rate}
        for name, simulated_value in latencies(simulated).items():
            real_value = latencies(real)[name]
            values |= {f"{name} s": real_value, f"{name} simulated": simulated_value / real_value}
        return values

    return measured


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


def serve(engine: Engine, traffic: Traffic, rate: float, threads: int) -> list[Record]:
    """Sends the requests to a batcher of the engine, in this process. One thread encodes their images."""
    design = EngineDesign.of(engine, TAG_LENGTH)
    backend = open_backend(engine, threads=threads)
    batcher = Batcher(backend, Tokenizer.from_directory(engine.path), traffic.requests, design.backend.prefill_chunk)
    edge = design.config.vision.image_size
    records: list[Record] = []
    pixels = np.zeros((traffic.tiles, 3, edge, edge), np.float32)
    waiting: queue.SimpleQueue[tuple[Ask, Request] | None] = queue.SimpleQueue()

    def encode() -> None:
        while entry := waiting.get():
            ask, request = entry
            images = [batcher.features(batcher.encode(pixels))] if traffic.tiles else []
            request.provide(traffic.prompt(backend.config, TAG_LENGTH, ask), images)

    encoder = threading.Thread(target=encode)
    if traffic.tiles:
        batcher.features(batcher.encode(pixels))  # the first run of a shape prepares it
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
