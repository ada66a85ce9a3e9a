"""Runs the vision encoder with OpenVINO on the CPU."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.backends.openvino import ENCODE_TILES
from nvlm_trt.backends.openvino.runtime import load
from nvlm_trt.errors import EngineError


class OpenVinoEncoder:
    """Runs vision_encoder.onnx, computing everything in bf16 that is not quantised. One thread encodes at a time."""

    def __init__(self, file: Path, threads: int) -> None:
        """Load the file. Raises EngineError for a file that OpenVINO does not load."""
        self._file = file
        openvino = load()
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # the decoder's threads use the same cores
        }
        try:
            compiled = openvino.Core().compile_model(str(file), "CPU", settings)
            self._request = compiled.create_infer_request()
            _, tokens, width = compiled.output(0).get_partial_shape()
            self._shape = (tokens.get_length(), width.get_length())  # T, hidden
        except RuntimeError as error:
            raise EngineError(
                f"engine file {file} cannot be loaded by OpenVINO ({_reason(error)}); rebuild the engine with "
                "`nvlm-trt build`"
            ) from error
        self._lock = threading.Lock()

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """Encode pixel_values [tiles, 3, E, E] into image tokens [tiles, T, hidden]."""
        pixel_values = np.ascontiguousarray(pixel_values, np.float32)
        image_tokens = np.empty((len(pixel_values), *self._shape), np.float32)
        with self._lock:
            for start in range(0, len(pixel_values), ENCODE_TILES):
                tiles = slice(start, start + ENCODE_TILES)
                image_tokens[tiles] = self._run(pixel_values[tiles])
        return image_tokens

    def _run(self, pixel_values: FloatArray) -> FloatArray:
        """Return image tokens [tiles, T, hidden] in the request's own memory."""
        try:
            image_tokens: FloatArray = self._request.infer([pixel_values], share_inputs=True, share_outputs=True)[0]
        except RuntimeError as error:
            raise EngineError(f"{self._file} failed in OpenVINO: {_reason(error)}") from error
        return image_tokens


def _reason(error: RuntimeError) -> str:
    """Return the last line of OpenVINO's message: the lines before name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
