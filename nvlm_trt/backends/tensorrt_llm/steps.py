"""Hands requests to the executor and its tokens back. The executor batches; here a request waits for a place in it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.backends.tensorrt_llm import contract
from nvlm_trt.errors import EngineError, NotFiniteError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.delivery import Delivery
from nvlm_trt.runtime.request import Request, State
from nvlm_trt.runtime.request_queue import RequestQueue
from nvlm_trt.runtime.sampling import Logprobs, token_logprob
from nvlm_trt.runtime.text_generator import GeneratorMetrics

if TYPE_CHECKING:
    import torch

# While the executor is silent, a new request or a cancellation waits so long. It is silent for one step at most.
_POLL = timedelta(milliseconds=10)

MakeRequest = Callable[[Request], contract.Request]  # of a request that was admitted


class ExecutorSteps:
    """Implements `Steps`. As many requests as the engine has slots are with the executor, so that none waits there: it
    would notice the cancellation of a waiting request only when it gives the request a place."""

    def __init__(
        self,
        executor: contract.Executor,
        reasons: type[contract.FinishReason],
        make_request: MakeRequest,
        limits: EngineLimits,
        placeholder_id: int,
        vocab_size: int,
        tokenizer: Tokenizer,
        max_queue: int,
    ) -> None:
        self._executor, self._reasons, self._make_request = executor, reasons, make_request
        self._limits, self._tokenizer = limits, tokenizer
        self._placeholder_id, self._vocab_size = placeholder_id, vocab_size
        self._queue = RequestQueue(max_queue)
        self._running: dict[int, Request] = {}  # by the executor's id
        self._leaving: set[int] = set()  # ids whose requests have ended for the caller, but not in the executor yet
        self._delivery = Delivery()

    def enqueue(self, request: Request) -> None:
        """Queue a request. Raises QueueFullError."""
        self._queue.put(request)

    @property
    def is_empty(self) -> bool:
        return not self._queue and not self._running and not self._leaving

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._leaving) or self._queue.any(lambda waiting: waiting.needs_a_step)

    def step(self) -> None:
        """Drop what was cancelled, fill free places, and take what the executor has."""
        self._drop_ended()
        while self._free and self._admit():
            pass
        if self._running or self._leaving:
            for response in self._responses():
                self._take(response)

    def cancel_all(self) -> None:
        """Cancel every request: they end with the next step."""
        for request in (*self._running.values(), *self._queue.snapshot()):
            request.cancel()

    def fail_all(self, error: Exception) -> None:
        """End every request with an error, without calling the executor."""
        requests = [*self._running.values(), *self._queue.take_all(lambda _: True)]
        self._running, self._leaving = {}, set()
        for request in requests:
            self._delivery.fail(request, error)

    def metrics(self) -> GeneratorMetrics:
        running = list(self._running.values())
        return GeneratorMetrics(
            queued=len(self._queue),
            active=sum(request.state is State.DECODING for request in running),
            free_slots=self._free,
            tokens_generated=self._delivery.tokens_generated,
            requests_finished=dict(self._delivery.finished),
        )

    # --- the parts of a step -----------------------------------------------------------------------------------------

    @property
    def _free(self) -> int:
        return self._limits.max_slots - len(self._running) - len(self._leaving)

    def _drop_ended(self) -> None:
        self._delivery.drop_ended(self._queue)
        for number, request in list(self._running.items()):
            if request.cancelled:
                self._leave(number)
                self._delivery.cancel(request)

    def _admit(self) -> bool:
        """Give the executor the most urgent request whose images are encoded. Return False if there is none."""
        request = self._queue.first(
            lambda waiting: waiting.state is State.READY, lambda waiting: waiting.sampling.priority
        )
        if request is None:
            return False
        self._queue.remove(request)
        try:
            request.admit(self._limits, self._placeholder_id, self._tokenizer)
            number = self._executor.enqueue_request(self._make_request(request))
        except RuntimeError as error:  # of TensorRT-LLM, or of torch for want of memory
            self._delivery.fail(
                request, EngineError(f"the request cannot be given to TensorRT-LLM ({first_line(error)})")
            )
        except Exception as error:
            self._delivery.fail(request, error)
        else:
            self._running[number] = request
        return True

    def _responses(self) -> list[contract.Response]:
        try:
            return self._executor.await_responses(timeout=_POLL)
        except RuntimeError as error:
            raise EngineError(first_line(error)) from error

    def _take(self, response: contract.Response) -> None:
        """Deliver the tokens of one response. Raises EngineError if the engine has failed."""
        number = response.request_id
        if response.has_error():
            self._take_error(number, first_line(response.error_msg))
            return
        result = response.result
        request = self._running.get(number)
        if request is not None:
            self._take_tokens(number, request, result)
        if result.is_final:
            self._leaving.discard(number)
            if self._running.get(number) is request and request is not None:
                self._end_early(number, request, result.finish_reasons[0])

    def _take_error(self, number: int, message: str) -> None:
        if message.startswith(contract.STEP_FAILED):  # every request of the step gets it
            raise EngineError(message)
        self._leaving.discard(number)
        request = self._running.pop(number, None)
        if request is not None:
            self._delivery.fail(request, EngineError(f"TensorRT-LLM refused the request ({message})"))

    def _take_tokens(self, number: int, request: Request, result: contract.Result) -> None:
        token_ids = result.output_token_ids[0] if result.output_token_ids else []  # of the only beam
        request.state = State.DECODING if token_ids else request.state
        for index, token_id in enumerate(token_ids):
            try:
                self._check_token(token_id)
                delta = request.accept_token(token_id, self._logprobs(request, token_id, result, index))
            except Exception as error:
                self._part(number, result)
                self._delivery.fail(request, error)
                return
            if delta.finish_reason:
                self._part(number, result)
                self._delivery.complete(request, delta)
                return
            error_of_caller = self._delivery.show(request, delta)
            if error_of_caller:
                self._part(number, result)
                self._delivery.fail(request, error_of_caller)
                return

    def _end_early(self, number: int, request: Request, reason: object) -> None:
        """End a request that the executor has ended before its own tokens did."""
        del self._running[number]
        if reason == self._reasons.LENGTH:
            self._delivery.complete(request, request.delta_without_token("length"))
        elif reason in (self._reasons.END_ID, self._reasons.STOP_WORDS):
            self._delivery.complete(request, request.delta_without_token("stop"))
        else:
            self._delivery.fail(request, EngineError(f"TensorRT-LLM ended the request without an answer ({reason})"))

    def _part(self, number: int, result: contract.Result) -> None:
        """Free the place of a request that has ended for the caller, or ask the executor to."""
        if result.is_final:
            del self._running[number]
        else:
            self._leave(number)

    def _leave(self, number: int) -> None:
        del self._running[number]
        self._leaving.add(number)
        self._executor.cancel_request(number)

    # --- tokens ------------------------------------------------------------------------------------------------------

    def _check_token(self, token_id: int) -> None:
        if not 0 <= token_id < self._vocab_size or token_id == self._placeholder_id:
            raise EngineError(f"TensorRT-LLM generated the id {token_id}, which is no token of the model's text")

    def _logprobs(self, request: Request, token_id: int, result: contract.Result, index: int) -> Logprobs | None:
        """Compute the token's log-probabilities from the model's logits: the executor's own are those after penalties
        and filters, and without alternatives."""
        if not request.sampling.logprobs:
            return None
        if result.generation_logits is None or index >= len(result.generation_logits):
            raise EngineError("TensorRT-LLM gave no logits for a token; ask without logprobs")
        logits = _host_row(result.generation_logits[index], self._vocab_size)  # [vocab]
        return token_logprob(logits, token_id, request.sampling.logprobs)


def first_line(message: object) -> str:
    """Return the first line of a message of TensorRT-LLM: the others are its stack."""
    return next((line.strip() for line in str(message).splitlines() if line.strip()), type(message).__name__)


def _host_row(logits: torch.Tensor, vocab_size: int) -> FloatArray:
    """Copy logits [beams, padded vocab] of one token to the host: [vocab]."""
    row: FloatArray = logits[0, :vocab_size].float().cpu().numpy()
    if not np.isfinite(row).all():
        raise NotFiniteError(
            "the model produced logits that are not finite; rebuild the engine, in bf16 if it is in fp16"
        )
    return row
