"""Images through the ensemble and back: tiling and vision_encoder run in processes of their own, batched by Triton."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import triton_python_backend_utils as pb_utils

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.errors import EngineError, ImageError, RequestError
from nvlm_trt.serving.chat_tensors import ENSEMBLE, decode_error


class EnsembleEncoder:
    """Sends an image through the ensemble, whose last step is this very model.

    `encode` waits on a thread of the pipeline; `deliver` is called by `execute` when the ensemble's last step arrives
    with the image tokens. A ticket, which only the two know, says whose they are.
    """

    def __init__(self) -> None:
        self._awaited: dict[str, Future[FloatArray]] = {}

    def encode(self, data: bytes, max_tiles: int) -> FloatArray:
        """Encoded bytes -> image tokens [n, T, hidden]. Raises ImageError and EngineError."""
        ticket = secrets.token_hex(16)
        delivered = self._awaited[ticket] = Future()
        try:
            self._run_ensemble(data, max_tiles, ticket)
            return delivered.result(timeout=0)  # the last step delivers before it answers
        finally:
            del self._awaited[ticket]

    def deliver(self, ticket: str, image_tokens: Sequence[FloatArray]) -> None:
        """The tokens [n, T, hidden] of the one image of a ticket."""
        delivered = self._awaited.get(ticket)
        if delivered is None or delivered.done() or len(image_tokens) != 1:
            raise RequestError("`ticket` is for the server's own use; leave it out")
        delivered.set_result(image_tokens[0])

    def _run_ensemble(self, data: bytes, max_tiles: int, ticket: str) -> None:
        request = pb_utils.InferenceRequest(
            model_name=ENSEMBLE,
            requested_output_names=["text"],
            inputs=[
                pb_utils.Tensor("image", np.array([data], np.object_)),
                pb_utils.Tensor("max_tiles", np.array([max_tiles], np.int32)),
                pb_utils.Tensor("ticket", np.array([ticket.encode()], np.object_)),
            ],
        )
        for response in request.exec(decoupled=True):
            if response.has_error():
                raise _error(response.error().message())


def _error(message: str) -> Exception:
    """An error of the ensemble by its message: between models Triton keeps no more of it than that."""
    error = decode_error(message)
    if isinstance(error, RequestError):
        return ImageError(str(error))
    return EngineError(f"the image was not encoded ({error}); the server's log has the details")
