"""Tiles of several requests -> image tokens, encoded as one batch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from nvlm_trt.backends import open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.errors import NvlmError


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        engine = Engine.open(parameters["engine"]["string_value"])
        threads = int(parameters["threads"]["string_value"])
        self._backend = open_backend(engine, ["vision_encoder"], threads=threads)

    def execute(self, requests: list[Any]) -> list[Any]:
        batches = [
            pb_utils.get_input_tensor_by_name(r, "pixel_values").as_numpy() for r in requests
        ]  # [n, 3, E, E] each
        try:
            image_tokens = self._backend.encode(np.concatenate(batches))  # [tiles, T, hidden]
        except NvlmError as error:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("image_tokens", tokens)])
            for tokens in np.split(image_tokens, ends)
        ]

    def finalize(self) -> None:
        self._backend.close()
