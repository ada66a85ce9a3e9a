"""Shows where the time of a prompt goes: the decoder's operators by ONNX Runtime's profiler, for some chunk sizes.

    python -m lab.prefill_profile --work WORK

Every round profiles each engine and chunk size in turn, after a prompt that warms up. The floor is the products of all
rows at the rate at which this machine multiplies, measured here with the shape of gate and up.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import partial

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from lab.common import parser, run
from lab.decode_profile import Profile, profiled
from lab.engines import random_engine
from lab.rounds import Contender, Rounds
from nvlm_trt.backends.base import StepBackend
from nvlm_trt.backends.onnxruntime.session import session_options
from nvlm_trt.engine import Engine
from nvlm_trt.model.presets import PRESETS

RESULT = "prefill_profile.json"
RATE = "MatMul in float32"
REPETITIONS = 20


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precisions", nargs="+", default=["bf16", "int8"])
    made.add_argument("--prompt-tokens", type=int, default=1870)
    made.add_argument("--chunks", nargs="+", type=int, default=[256, 1024], help="tokens in one run")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    llm = PRESETS[arguments.preset].llm
    contenders: dict[str, Contender] = {
        f"{RATE}, {rows} rows": partial(product_rate, rows, llm.hidden_size, llm.intermediate_size, arguments.threads)
        for rows in arguments.chunks
    }
    for precision in arguments.precisions:
        engine = random_engine(arguments.work, arguments.preset, precision)
        for chunk in arguments.chunks:
            profile = partial(profile_of_prompt, engine, arguments.prompt_tokens, chunk, arguments.threads)
            contenders[f"{precision}, {chunk} tokens at once"] = profile
    rounds.run(contenders, arguments.rounds)
    rounds.report()


def product_rate(rows: int, inputs: int, outputs: int, threads: int) -> Mapping[str, float]:
    """Measures the operations, two per multiplication and addition, of [rows, inputs] times [inputs, outputs]."""
    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.standard_normal((inputs, outputs), dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(threads))
    feeds = {"x": random.standard_normal((rows, inputs), dtype=np.float32)}
    session.run(None, feeds)
    started = time.perf_counter()
    for _ in range(REPETITIONS):
        session.run(None, feeds)
    return {"Gop/s": 2e-9 * rows * inputs * outputs * REPETITIONS / (time.perf_counter() - started)}


def profile_of_prompt(engine: Engine, tokens: int, chunk: int, threads: int) -> Profile:
    ids = np.random.default_rng(0).integers(0, 256, tokens, dtype=np.int64)

    def prefill(backend: StepBackend) -> float:
        no_image = backend.embeddings([], 0, 0)
        for _ in range(2):
            started = time.perf_counter()
            for start in range(0, tokens, chunk):
                part = ids[start : start + chunk]
                is_last = start + chunk >= tokens
                backend.prefill(0, start, part, no_image, np.zeros((len(part), 2), np.int32), is_last)
        return (time.perf_counter() - started) * 1e3

    return profiled(engine, threads, prefill, runs=-(-tokens // chunk))


if __name__ == "__main__":
    run(options(), measure, RESULT)
