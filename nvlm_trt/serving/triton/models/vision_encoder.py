"""Implements the model `vision_encoder` for backends that Triton does not run itself."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from nvlm_trt.backends.opening import open_backend, runtime_here
from nvlm_trt.errors import NvlmError
from nvlm_trt.serving.triton.models.parameters import open_engine, read_parameters


class VisionEncoderModel:
    """A python model that encodes the tiles of several requests as one batch. Triton's dynamic batcher forms it."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils

    def initialize(self, args: dict[str, str]) -> None:
        parameters = read_parameters(args)
        engine = open_engine(parameters)
        os.nice(int(parameters["niceness"]))  # before threads start, which inherit the niceness
        self._backend = open_backend(engine, ["vision_encoder"], threads=int(parameters["threads"]))
        self._pb_utils.Logger.log_info(f"vision_encoder: {runtime_here(engine, 'vision_encoder')}")

    def execute(self, requests: list[Any]) -> list[Any]:
        pb_utils = self._pb_utils
        batches = [
            pb_utils.get_input_tensor_by_name(request, "pixel_values").as_numpy() for request in requests
        ]  # [n, 3, E, E] each
        try:
            encoded = self._backend.encode(np.concatenate(batches))
            image_tokens = self._backend.to_host(encoded)  # [tiles, T, hidden]
        except NvlmError as error:
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))) for _ in requests]
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("image_tokens", tokens)])
            for tokens in np.split(image_tokens, ends)
        ]

    def finalize(self) -> None:
        self._backend.close()
