"""Implements the model `nvlm`, which clients call. It owns the engine and the response senders of all requests."""

from __future__ import annotations

import os
import threading
from typing import Any

from nvlm_trt.errors import ServerError
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions
from nvlm_trt.serving.triton.models.answer_sender import AnswerSender
from nvlm_trt.serving.triton.models.chat_request import read_chat
from nvlm_trt.serving.triton.models.image_encoder import ImageEncoder
from nvlm_trt.serving.triton.models.metrics import ModelMetrics
from nvlm_trt.serving.triton.models.parameters import image_limits, read_parameters
from nvlm_trt.serving.triton.models.responses import Responses

_REPORT_SECONDS = 0.1


class ChatModel:
    """A decoupled python model: one request, many responses."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils

    def initialize(self, args: dict[str, str]) -> None:
        parameters = read_parameters(args)
        self._drain_file = parameters["drain_file"]
        self._pipeline = Pipeline.open(
            parameters["engine"],
            threads=int(parameters["threads"]),
            encode_tiles=ImageEncoder(self._pb_utils).encode_tiles,
            options=RuntimeOptions(
                max_queue=int(parameters["max_queue"]),
                encode_workers=int(parameters["encode_workers"]),
                decode_workers=int(parameters["decode_workers"]) if "decode_workers" in parameters else None,
                image_limits=image_limits(parameters),
            ),
        )
        self._responses = Responses(self._pb_utils)
        self._metrics = ModelMetrics(self._pb_utils)
        self._answers = AnswerSender(self._pb_utils, self._responses, self._metrics.add_late_tokens)
        self._closing = threading.Event()
        self._reporter = threading.Thread(target=self._report, name="nvlm-reporter", daemon=True)
        self._reporter.start()

    def execute(self, requests: list[Any]) -> None:
        """Start the requests and return. Another thread sends the answers."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except Exception as error:
                final = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                sender.send(self._responses.of_error(error), flags=final)

    def finalize(self) -> None:
        """Finish the submitted requests. The server waits for its exit timeout at most."""
        self._closing.set()
        self._pipeline.close()
        self._answers.close()
        self._reporter.join()

    def _start(self, request: Any, sender: Any) -> None:
        if os.path.exists(self._drain_file):
            raise ServerError("the server is stopping; send the request to another one")
        chat = read_chat(self._pb_utils, request, self._pipeline.import_tokens)
        request_id = request.request_id()
        self._answers.answer(sender, lambda put: self._pipeline.submit(chat, put, put, request_id=request_id))

    def _report(self) -> None:
        while not self._closing.wait(_REPORT_SECONDS):
            # read before the other metrics: when it is 0, they count every request that has ended
            open_requests = self._answers.open_requests
            self._metrics.report(self._pipeline.metrics(), open_requests)
            if not self._pipeline.healthy:
                # Triton would still report the model as ready, but process_watch notices that the process has ended
                self._pb_utils.Logger.log_error("the engine has failed: its process ends so that the server restarts")
                os._exit(1)
