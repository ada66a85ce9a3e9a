"""Compares ONNX Runtime with OpenVINO on the decoder's own file: prefill of whole prompts, and decoding steps.

    python -m lab.decoder_runtimes --work WORK

Both read the same decoder.onnx. ONNX Runtime writes new keys and values into the caches where they are; OpenVINO
returns whole caches, of which the new rows are copied back, or nothing is copied when decoding (its time without the
copy). OpenVINO computes in bf16 what is not quantised. Its GroupQueryAttention takes one sequence at a time, so that
several requests cannot be decoded together this way.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lab.common import parser, run
from lab.engines import random_engine
from lab.rounds import Contender, Rounds
from nvlm_trt.backends.base import StepBackend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.openvino.runtime import load
from nvlm_trt.engine import Engine

RESULT = "decoder_runtimes.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "openvino", "numpy")
STEPS = 8

Prefill = Callable[[npt.NDArray[np.int64], int], None]  # token ids [S], tokens in one run
Decode = Callable[[int], None]  # tokens cached before


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=3)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    made.add_argument("--prompts", nargs="+", type=int, default=[256, 1870, 3000], help="tokens")
    made.add_argument("--chunks", nargs="+", type=int, default=[256, 1024], help="tokens in one run")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    contenders: dict[str, Contender] = {}
    for precision in arguments.precisions:
        engine = random_engine(arguments.work, arguments.preset, precision)
        backend = open_backend(engine, ["decoder"], threads=arguments.threads)
        ours, theirs = OnnxRuntimeDecoder(backend), OpenVinoDecoder(engine, arguments.threads)
        contenders[f"ONNX Runtime {precision}"] = contender(ours.prefill, ours.decode, arguments)
        contenders[f"OpenVINO {precision}"] = contender(theirs.prefill, theirs.decode, arguments)
    rounds.run(contenders, arguments.rounds)
    metrics = list(next(iter(rounds.values.values())))
    rounds.report(
        [
            (metric, f"OpenVINO {precision}", f"ONNX Runtime {precision}")
            for precision in arguments.precisions
            for metric in metrics
        ]
    )


def contender(prefill: Prefill, decode: Decode, arguments: argparse.Namespace) -> Contender:
    rng = np.random.default_rng(0)
    prompts = {tokens: rng.integers(0, 256, tokens, dtype=np.int64) for tokens in arguments.prompts}

    def measure() -> Mapping[str, float]:
        times = {}
        for tokens, ids in prompts.items():
            for chunk in arguments.chunks:
                if chunk == min(arguments.chunks) or tokens >= chunk:
                    times[f"prefill of {tokens} by {chunk} ms"] = 1e3 * timed(partial(prefill, ids, chunk))
        steps = [timed(partial(decode, 128 + step)) for step in range(STEPS)]
        return {**times, "decoding step ms": 1e3 * statistics.median(steps)}

    return measure


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class OnnxRuntimeDecoder:
    def __init__(self, backend: StepBackend) -> None:
        self._backend = backend
        self._no_image = backend.embeddings([], 0, 0)

    def prefill(self, ids: npt.NDArray[np.int64], chunk: int) -> None:
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            is_last = start + chunk >= len(ids)
            self._backend.prefill(0, start, part, self._no_image, np.zeros((len(part), 2), np.int32), is_last)

    def decode(self, cached: int) -> None:
        self._backend.decode(np.array([5]), np.array([cached]), np.zeros((1, 2), np.int32))


class OpenVinoDecoder:
    """Runs decoder.onnx of an NVLM-D engine."""

    def __init__(self, engine: Engine, threads: int) -> None:
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = load().Core().compile_model(str(engine.path / "decoder.onnx"), "CPU", settings)
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.names}
        self._presents = {port: port.any_name for port in compiled.outputs if port.any_name.startswith("present_")}
        llm = engine.config.llm
        shape = (1, llm.num_kv_heads, engine.limits.max_seq_len, llm.head_dim)
        names = [name.replace("present_", "past_") for name in self._presents.values()]
        self._caches = {name: np.zeros(shape, np.float32) for name in names}
        self._no_image = np.zeros((0, llm.hidden_size), np.float32)

    def prefill(self, ids: npt.NDArray[np.int64], chunk: int) -> None:
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            stop = start + len(part)
            results = self._run(part, start)
            for port, name in self._presents.items():
                new = results[port][:, :, start:stop]
                self._caches[name.replace("present_", "past_")][:, :, start:stop] = new

    def decode(self, cached: int) -> None:
        self._run(np.array([5]), cached)

    def _run(self, ids: npt.NDArray[np.int64], position: int) -> Any:
        """Run ids [S] from `position` on."""
        inputs = {
            "input_ids": ids[None],
            "image_tokens": self._no_image,
            "write_indices": np.array([position]),
            "logit_index": np.array([[len(ids) - 1]]),  # also where nobody reads the logits
            **self._caches,
        }
        given = {name: value for name, value in inputs.items() if name in self._inputs}
        return self._request.infer(given, share_inputs=True, share_outputs=True)


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
