"""In-flight batching: requests join and leave a running batch at any token."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np

from nvlm_trt.backends.base import Backend, FloatArray
from nvlm_trt.errors import RequestError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.generation import Delta, Submission
from nvlm_trt.runtime.request_queue import RequestQueue
from nvlm_trt.runtime.sequence import Sequence
from nvlm_trt.runtime.slots import Slots

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SchedulerMetrics:
    """A snapshot, possibly of the middle of a step. Counters run from the start."""

    queued: int  # submitted, without a slot
    active: int  # being decoded
    free_slots: int
    tokens_generated: int
    requests_finished: Mapping[str, int]  # by "stop", "length", "cancelled" and "error"


class Scheduler:
    """Decides what the backend runs next. Not thread-safe but for `enqueue` and `metrics`."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, max_queue: int, prefill_chunk: int) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._prefill_chunk = prefill_chunk
        self._queue = RequestQueue(max_queue)
        self._slots = Slots(backend)
        self._tokens_generated = 0
        self._finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)

    def enqueue(self, submission: Submission) -> None:
        """Raises QueueFullError."""
        self._queue.put(submission)

    @property
    def is_empty(self) -> bool:
        return not self._queue and not self._slots.occupants

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything: there may be only requests whose images are still being encoded."""
        return bool(self._slots.occupants) or self._queue.any(lambda s: s.is_ready or s.handle.cancelled)

    def step(self) -> None:
        """One round: at most one chunk of one prompt, then one token for every active request."""
        self._drop_ended()
        if self._slots.prefilling is None and self._slots.free:
            self._admit()
        if self._slots.prefilling:
            self._prefill(self._slots.prefilling)
        if self._slots.active:
            self._decode(self._slots.active)

    def cancel_all(self) -> None:
        """Every request ends with the next step."""
        for sequence in self._slots.occupants:
            sequence.submission.handle.cancel()
        for submission in self._queue.snapshot():
            submission.handle.cancel()

    def fail_all(self, error: Exception) -> None:
        """End every request with an error, without another call of the backend."""
        submissions = [sequence.submission for sequence in self._slots.occupants]
        submissions += self._queue.take_all(lambda _: True)
        self._slots = Slots(self._backend)
        for submission in submissions:
            self._fail(submission, error)

    def metrics(self) -> SchedulerMetrics:
        return SchedulerMetrics(
            queued=len(self._queue),
            active=len(self._slots.active),
            free_slots=self._slots.free,
            tokens_generated=self._tokens_generated,
            requests_finished=dict(self._finished),
        )

    # --- the parts of a step -----------------------------------------------------------------------------------------

    def _drop_ended(self) -> None:
        """Take out what was cancelled, wherever it is, and what waits although its images could not be encoded."""
        for submission in self._queue.take_all(lambda s: s.handle.cancelled):
            submission.prepared.cancel()
            self._complete(submission, Delta("", [], finish_reason="cancelled"))
        for submission in self._queue.take_all(lambda s: s.failure is not None):
            assert submission.failure is not None
            self._fail(submission, submission.failure)
        cancelled = [sequence for sequence in self._slots.occupants if sequence.submission.handle.cancelled]
        self._slots.retire(cancelled)
        for sequence in cancelled:
            self._complete(sequence.submission, Delta("", [], finish_reason="cancelled", usage=sequence.usage()))

    def _admit(self) -> None:
        """Give a slot to the oldest request whose images are encoded."""
        submission = self._queue.take_first(lambda s: s.is_ready and s.failure is None)
        if submission is None:
            return
        try:
            sequence = Sequence(submission, self._backend, self._tokenizer)
        except Exception as error:
            self._fail(submission, error)
            return
        try:
            self._slots.admit(sequence)
        except RequestError as error:  # what the backend says of this request; anything else is its own failure
            self._drop(sequence, error)

    def _prefill(self, sequence: Sequence) -> None:
        chunk = sequence.next_chunk(self._prefill_chunk)
        try:
            logits = self._backend.prefill(
                sequence.slot, chunk.position, chunk.input_ids, chunk.image_tokens, chunk.cross_ranges
            )  # [vocab]
        except RequestError as error:
            self._drop(sequence, error)
            return
        if sequence.is_prefilled:
            self._accept([sequence], [logits])
        if sequence.is_prefilled and self._slots.prefilling:  # it may have ended with its first token
            self._slots.activate()

    def _decode(self, active: Rows[Sequence]) -> None:
        sequences = tuple(active)
        token_ids, positions, ranges = zip(*(sequence.next_token() for sequence in sequences), strict=True)
        logits = self._backend.decode(
            np.array(token_ids, np.int64), np.array(positions, np.int64), np.array(ranges, np.int32)
        )  # [n, vocab]
        self._accept(sequences, logits)

    def _accept(self, sequences: Rows[Sequence], logits: Rows[FloatArray] | FloatArray) -> None:
        """Draw a token for each sequence, logits [vocab] each. Slots are freed before anybody is told of an end."""
        results = [_next_delta(sequence, row) for sequence, row in zip(sequences, logits, strict=True)]
        self._slots.retire([sequence for sequence, result in zip(sequences, results, strict=True) if _is_last(result)])
        for sequence, result in zip(sequences, results, strict=True):
            if isinstance(result, Exception):
                self._fail(sequence.submission, result)
            elif result.finish_reason:
                self._complete(sequence.submission, result)
            else:
                self._show(sequence, result)

    # --- telling the caller ------------------------------------------------------------------------------------------

    def _show(self, sequence: Sequence, delta: Delta) -> None:
        self._tokens_generated += len(delta.token_ids)
        try:
            sequence.submission.on_delta(delta)
        except Exception as error:
            logger.exception("request %s is dropped: its on_delta raised", sequence.submission.handle.request_id)
            self._drop(sequence, error)

    def _drop(self, sequence: Sequence, error: Exception) -> None:
        self._slots.retire([sequence])
        self._fail(sequence.submission, error)

    def _complete(self, submission: Submission, delta: Delta) -> None:
        assert delta.finish_reason
        self._tokens_generated += len(delta.token_ids)
        self._finished[delta.finish_reason] += 1
        try:
            submission.on_delta(delta)
        except Exception:
            logger.exception("request %s: on_delta raised at its end", submission.handle.request_id)

    def _fail(self, submission: Submission, error: Exception) -> None:
        submission.prepared.cancel()
        self._finished["error"] += 1
        try:
            submission.on_error(error)
        except Exception:
            logger.exception("request %s: on_error raised when told: %s", submission.handle.request_id, error)


def _next_delta(sequence: Sequence, logits: FloatArray) -> Delta | Exception:
    """What goes wrong with one request's token stays with that request."""
    try:
        return sequence.accept(logits)
    except Exception as error:
        return error


def _is_last(result: Delta | Exception) -> bool:
    return isinstance(result, Exception) or result.finish_reason is not None
