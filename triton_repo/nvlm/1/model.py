"""The model that clients call: owns the engine and every request's response sender."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import chat_tensors
import triton_python_backend_utils as pb_utils
from answer_sender import AnswerSender
from ensemble_encoder import EnsembleEncoder
from error_response import error_response
from server_metrics import ServerMetrics

from nvlm_trt.errors import ServerError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

_REPORT_SECONDS = 0.1


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        entries = json.loads(args["model_config"])["parameters"]
        parameters = {name: entry["string_value"] for name, entry in entries.items()}
        limits = ImageLimits(**{name: int(parameters[name]) for name in ("max_pixels", "max_bytes", "max_images")})
        self._drain_file = parameters["drain_file"]
        self._on_device = parameters["FORCE_CPU_ONLY_INPUT_TENSORS"] == "no"
        self._encoder = EnsembleEncoder()
        self._pipeline = Pipeline.open(
            parameters["engine"],
            threads=int(parameters["threads"]),
            encode_image=self._encoder.encode,
            options=RuntimeOptions(
                max_queue=int(parameters["max_queue"]),
                encode_workers=int(parameters["encode_workers"]),
                image_limits=limits,
            ),
        )
        self._metrics = ServerMetrics()
        self._answers = AnswerSender(self._metrics.add_late_tokens)
        self._closing = threading.Event()
        self._reporter = threading.Thread(target=self._report, name="nvlm-reporter", daemon=True)
        self._reporter.start()

    def execute(self, requests: list[Any]) -> None:
        """Start what is given and return: answers are sent by a thread of their own."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                ticket = chat_tensors.ticket(request)
                if ticket is None:
                    self._start(request, sender)
                else:
                    self._encoder.deliver(ticket, chat_tensors.image_tokens(request, self._on_device))
                    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            except Exception as error:
                sender.send(error_response(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Finish what was submitted; the server waits no longer than its exit timeout."""
        self._closing.set()
        self._pipeline.close()
        self._answers.close()
        self._reporter.join()

    def _start(self, request: Any, sender: Any) -> None:
        if os.path.exists(self._drain_file):
            raise ServerError("the server is stopping; send the request to another one")
        chat = chat_tensors.chat_request(request, self._on_device)
        request_id = request.request_id()
        self._answers.answer(sender, lambda put: self._pipeline.submit(chat, put, put, request_id=request_id))

    def _report(self) -> None:
        while not self._closing.wait(_REPORT_SECONDS):
            open_requests = self._answers.open_requests  # first: who reads 0 finds all that ended counted
            self._metrics.report(self._pipeline.metrics(), open_requests)
            if not self._pipeline.healthy:
                # Triton would go on calling the model ready; whoever watches this process knows better
                pb_utils.Logger.log_error("the engine has failed: its process ends so that the server is restarted")
                os._exit(1)
