"""Compares ONNX Runtime with OpenVINO on the vision encoder's own file: one image's tiles, weights in float and int8.

    python -m lab.encoder_runtimes --work WORK --publish

ONNX Runtime computes in float32 what is not quantised, OpenVINO in bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping

import numpy as np

from lab.common import parser, run
from lab.engines import random_engine
from lab.rounds import Contender, Rounds
from nvlm_trt.backends.base import FloatArray
from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend
from nvlm_trt.backends.onnxruntime.vision_runtime import STAGE
from nvlm_trt.backends.openvino.encoder import OpenVinoEncoder

RESULT = "encoder_runtimes.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "openvino", "numpy")
METRIC = "encode s"
PRECISIONS = {"unquantised": "bf16", "int8": "int8,vision_encoder=int8"}


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--tiles", type=int, default=7)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    contenders: dict[str, Contender] = {}
    for name, precision in PRECISIONS.items():
        engine = random_engine(arguments.work, arguments.preset, precision)
        edge = engine.config.vision.image_size
        pixels = np.random.default_rng(0).standard_normal((arguments.tiles, 3, edge, edge), np.float32)
        ours = OnnxRuntimeBackend(engine, [STAGE], arguments.threads)
        theirs = OpenVinoEncoder(engine.path / f"{STAGE}.onnx", arguments.threads)
        contenders[f"ONNX Runtime, {name}"] = contender(ours.encode, pixels)
        contenders[f"OpenVINO, {name}"] = contender(theirs.encode, pixels)
    rounds.run(contenders, arguments.rounds)
    rounds.report([(METRIC, f"OpenVINO, {name}", f"ONNX Runtime, {name}") for name in PRECISIONS])


def contender(encode: Callable[[FloatArray], object], pixels: FloatArray) -> Contender:
    def measured() -> Mapping[str, float]:
        started = time.perf_counter()
        encode(pixels)
        return {METRIC: time.perf_counter() - started}

    return measured


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
