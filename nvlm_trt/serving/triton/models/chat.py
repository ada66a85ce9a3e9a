"""Implements the model `nvlm`, which clients call. It owns the engine and the response senders of all requests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from nvlm_trt.errors import QueueFullError
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions
from nvlm_trt.runtime.request import Request as PipelineRequest
from nvlm_trt.serving.triton.models.answer_sender import AnswerSender, Event
from nvlm_trt.serving.triton.models.cancel_token import read_tokens
from nvlm_trt.serving.triton.models.chat_request import is_only_counted, read_chat, reads_stream
from nvlm_trt.serving.triton.models.counting import Counting
from nvlm_trt.serving.triton.models.draining import Draining
from nvlm_trt.serving.triton.models.image_encoder import ImageEncoder
from nvlm_trt.serving.triton.models.metrics import ModelMetrics
from nvlm_trt.serving.triton.models.observed_request import ObservedRequest
from nvlm_trt.serving.triton.models.parameters import image_limits, open_engine, read_parameters
from nvlm_trt.serving.triton.models.responses import Responses

_REPORT_SECONDS = 0.1
# Encoded images are held until they are encoded: at most as many bytes as this number of the largest requests has.
_HELD_REQUESTS = 2


class ChatModel:
    """A decoupled python model: one request, many responses."""

    def __init__(self, pb_utils: Any) -> None:
        self._pb_utils = pb_utils

    def initialize(self, args: dict[str, str]) -> None:
        parameters = read_parameters(args)
        self._image_limits = limits = image_limits(parameters)
        self._most_held_bytes = _HELD_REQUESTS * limits.max_images * limits.max_bytes
        self._pipeline = Pipeline.open(
            open_engine(parameters).path,
            threads=int(parameters["threads"]),
            encode_tiles=ImageEncoder(self._pb_utils).encode_tiles,
            options=RuntimeOptions(
                max_queue=int(parameters["max_queue"]),
                reuse_prompts=parameters.get("reuse_prompts") != "no",
                encode_workers=int(parameters["encode_workers"]),
                decode_workers=int(parameters["decode_workers"]) if "decode_workers" in parameters else None,
                image_limits=self._image_limits,
                prepare_constraints=True,
            ),
        )
        self._responses = Responses(self._pb_utils)
        self._metrics = ModelMetrics(self._pb_utils)
        self._answers = AnswerSender(self._pb_utils, self._responses, self._metrics.add_late_tokens)
        self._counting = Counting(self._pb_utils, self._responses, self._pipeline.count)
        self._draining = Draining(int(parameters["drain_descriptor"]), self._answers)
        self._closing = threading.Event()
        # two threads: thousands of observations must not delay the number of open requests, on which draining waits
        self._reporters = [
            threading.Thread(target=self._report, name="nvlm-reporter", daemon=True),
            threading.Thread(target=self._send_observations, name="nvlm-observations", daemon=True),
        ]
        for reporter in self._reporters:
            reporter.start()

    def execute(self, requests: list[Any]) -> None:
        """Start the requests and return. Another thread sends the answers."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except Exception as error:
                self._metrics.add_refusal(error)
                final = self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                sender.send(self._responses.of_error(error), flags=final)

    def finalize(self) -> None:
        """Finish the submitted requests. The server waits for its exit timeout at most."""
        self._closing.set()
        self._counting.close()
        self._pipeline.close()
        self._answers.close()
        self._draining.finish()
        for reporter in self._reporters:
            reporter.join()

    def _start(self, request: Any, sender: Any) -> None:
        arrived = time.monotonic()
        tokens = read_tokens(request)
        if tokens.cancelled is not None:  # also while the server drains
            self._cancel(tokens.cancelled, sender)
            return
        with self._draining.admit():
            chat = read_chat(self._pb_utils, request, self._pipeline.import_tokens, self._image_limits)
            request_id = request.request_id()
            image_bytes = sum(len(image) for image in chat.images if isinstance(image, bytes))
            self._check_held(image_bytes)
            if is_only_counted(self._pb_utils, request):
                self._counting.answer(sender, chat, image_bytes, tokens.own)
                return

            def submit(put: Callable[[Event], None]) -> PipelineRequest:
                observed = ObservedRequest(self._metrics, put, arrived)
                return self._pipeline.submit(chat, observed, observed, request_id=request_id)

            answers = chat.sampling.n
            stream = reads_stream(self._pb_utils, request, answers)
            self._answers.answer(sender, submit, stream, image_bytes, answers, tokens.own)

    def _cancel(self, token: str, sender: Any) -> None:
        """Cancel the open requests with this token, and tell nobody whether there are any: tokens are secrets."""
        self._answers.cancel(token)
        self._counting.cancel(token)
        sender.send(self._responses.of_cancellation(), flags=self._pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send_observations(self) -> None:
        while not self._closing.wait(_REPORT_SECONDS):
            while self._metrics.observations.send() and not self._closing.is_set():
                pass

    def _check_held(self, image_bytes: int) -> None:
        """Raise QueueFullError if the images of the waiting requests and of one more take too much memory."""
        held = self._answers.held_image_bytes + self._counting.held_image_bytes
        if held + image_bytes > self._most_held_bytes:
            raise QueueFullError(
                f"the images that wait to be encoded have {held >> 20} MiB, at most {self._most_held_bytes >> 20} are "
                "held; try again later"
            )

    def _report(self) -> None:
        while not self._closing.wait(_REPORT_SECONDS):
            # read before the other metrics: when it is 0, they count every request that has ended
            open_requests = self._answers.open_requests
            self._metrics.report(self._pipeline.metrics(), open_requests)
            if not self._pipeline.healthy:
                # Triton would still report the model as ready, but process_watch notices that the process has ended
                self._pb_utils.Logger.log_error("the engine has failed: its process ends so that the server restarts")
                os._exit(1)
