"""Schedules in-flight batching: requests join and leave the running batch between any two tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nvlm_trt.api import Delta
from nvlm_trt.backends.base import FloatArray, StepBackend
from nvlm_trt.errors import RequestError
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.choice import Choice
from nvlm_trt.runtime.delivery import Delivery
from nvlm_trt.runtime.prompt_key import PromptKey
from nvlm_trt.runtime.request import Request, State
from nvlm_trt.runtime.request_queue import RequestQueue
from nvlm_trt.runtime.sampling import check_bias
from nvlm_trt.runtime.slots import Slots
from nvlm_trt.runtime.text_generator import GeneratorMetrics

PATIENCE = 2


class Scheduler:
    """Implements `Steps`: decides what the backend runs next. Only `enqueue` and `metrics` are thread-safe."""

    def __init__(
        self, backend: StepBackend, tokenizer: Tokenizer, max_queue: int, prefill_chunk: int, reuse_prompts: bool = True
    ) -> None:
        """`reuse_prompts`: take over what the caches hold of a prompt from earlier ones."""
        self._backend = backend
        self._tokenizer = tokenizer
        self._prefill_chunk = prefill_chunk
        # no prompt has a whole chunk of max_seq_len tokens
        self._shared_chunk = prefill_chunk if reuse_prompts else backend.limits.max_seq_len
        assert backend.config.image_token_id is not None, "read_config takes image_token_id from the tokenizer"
        self._placeholder_id = backend.config.image_token_id
        self._queue = RequestQueue(max_queue)
        self._slots = Slots(backend)
        self._delivery = Delivery()
        self._chunks = 0  # that were run
        self._checks_drafts = True  # until the backend says that it cannot
        self._draft_tokens = 0
        self._accepted_draft_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0

    def enqueue(self, request: Request) -> None:
        """Queue a request. Raises QueueFullError, and ParameterError for sampling parameters that the engine cannot
        follow."""
        sampling, vocab_size = request.sampling, self._backend.config.llm.vocab_size
        self._backend.limits.check_answers(sampling.n)
        if sampling.logit_bias:
            stop_ids = () if sampling.ignore_eos else self._tokenizer.stop_ids
            check_bias(sampling, vocab_size, {self._placeholder_id}, stop_ids)
        request.arrived = self._chunks
        self._queue.put(request)

    @property
    def is_empty(self) -> bool:
        return not self._queue and self._slots.is_empty

    @property
    def has_work(self) -> bool:
        """Return whether `step` would do anything. It does nothing while all requests wait for their images."""
        return not self._slots.is_empty or self._queue.any(lambda waiting: waiting.needs_a_step)

    def step(self) -> None:
        """Run at most one chunk of one prompt, then one token of every active answer, and what is drafted of it."""
        self._drop_ended()
        if request := self._next_prompt():
            self._prefill(request)
        if self._slots.active:
            self._decode(self._slots.active)
            self._check_drafts()

    def cancel_all(self) -> None:
        """Cancel every request: they end with the next step."""
        for request in (*self._slots.occupants, *self._queue.snapshot()):
            request.cancel()

    def fail_all(self, error: Exception) -> None:
        """End every request with an error, without calling the backend."""
        requests = [*self._slots.occupants, *self._queue.take_all(lambda _: True)]
        self._slots = Slots(self._backend)
        for request in requests:
            self._delivery.fail(request, error)

    def metrics(self) -> GeneratorMetrics:
        return GeneratorMetrics(
            queued=len(self._queue),
            active=len(self._slots.active),
            free_slots=self._slots.free,
            tokens_generated=self._delivery.tokens_generated,
            requests_finished=dict(self._delivery.finished),
            kept_prompts=self._slots.kept,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            draft_tokens=self._draft_tokens,
            accepted_draft_tokens=self._accepted_draft_tokens,
        )

    # --- the parts of a step -----------------------------------------------------------------------------------------

    def _drop_ended(self) -> None:
        """Remove cancelled requests from queue and slots, and requests whose images could not be encoded."""
        self._delivery.drop_ended(self._queue)
        cancelled = [request for request in self._slots.occupants if request.cancelled]
        self._slots.retire(cancelled)
        for request in cancelled:
            self._delivery.cancel(request)

    def _next_prompt(self) -> Request | None:
        """Choose whose chunk is run: of the prompts that are prefilled, and of the waiting ones, which get slots only
        when it is their turn. A request that has its turn, but not enough free slots, lets nobody behind it have
        them: it would wait for as long as small requests come."""
        while True:
            running = min(self._slots.prefilling, key=self._turn, default=None)
            waiting = self._queue.first(_is_ready, self._turn) if self._slots.free else None
            if waiting is None or (running and self._turn(running) <= self._turn(waiting)):
                return running
            if waiting.sampling.n > self._slots.free:
                return running
            self._queue.remove(waiting)
            if self._admit(waiting):
                return waiting

    def _turn(self, request: Request) -> tuple[int, float]:
        """Return a number for the order of prompts, lowest first, behind the request's priority.

        The shortest rest of a prompt comes first, but a prompt of r chunks lets later ones go before it only if they
        arrive while PATIENCE * r chunks are run."""
        key = self._key(request)
        tokens = len(request.prompt.input_ids)
        done = request.cached if request.state is State.PREFILLING else self._slots.cached_tokens(key, tokens)
        return request.sampling.priority, request.arrived + PATIENCE * -(-(tokens - done) // self._prefill_chunk)

    def _key(self, request: Request) -> PromptKey:
        return request.key(self._placeholder_id, self._shared_chunk)

    def _admit(self, request: Request) -> bool:
        """Give slots to a request for all its answers. Return False if it has failed."""
        try:
            request.admit(self._backend.limits, self._placeholder_id, self._tokenizer)
        except Exception as error:
            self._delivery.fail(request, error)
            return False
        try:
            self._slots.admit(request, self._key(request))
        except RequestError as error:  # the backend refuses this request; any other error means that it has failed
            self._drop(request, error)
            return False
        self._prompt_tokens += len(request.prompt.input_ids)
        self._cached_tokens += request.reused
        return True

    def _prefill(self, request: Request) -> None:
        chunk = request.next_chunk(self._prefill_chunk)
        self._chunks += 1
        try:
            embeddings = self._backend.embeddings(request.images, chunk.first_embedding, chunk.last_embedding)
            logits = self._backend.prefill(
                request.slot, chunk.position, chunk.input_ids, embeddings, chunk.cross_ranges, request.is_prefilled
            )  # [vocab] of the prompt's last token
        except RequestError as error:
            self._drop(request, error)
            return
        if request.is_prefilled:
            self._accept(request.choices, [logits] * len(request.choices))
        if request.is_prefilled and request in self._slots.prefilling:  # it may have ended with its first token
            self._slots.activate(request, request.unfinished)

    def _decode(self, active: Sequence[Choice]) -> None:
        choices = tuple(active)
        token_ids, positions, ranges = zip(*(choice.next_token() for choice in choices), strict=True)
        logits = self._backend.decode(
            np.array(token_ids, np.int64), np.array(positions, np.int64), np.array(ranges, np.int32)
        )  # [n, vocab]
        self._accept(choices, logits)

    def _check_drafts(self) -> None:
        """Run the drafted tokens of each answer in one step, and accept what is drawn from the logits until a token is
        not the drafted one. Each token is drawn as without drafts, so the answer has the same distribution."""
        for choice in tuple(self._slots.active):
            drafted = choice.draft() if self._checks_drafts and choice in self._slots.active else []
            if not drafted:
                continue
            input_ids = np.array([choice.last_id, *drafted], np.int64)
            ranges = np.tile(np.array(choice.request.prompt.decode_range, np.int32), (len(input_ids), 1))
            logits = self._backend.score_tokens(choice.slot, choice.cached, input_ids, ranges)  # [S, vocab]
            if logits is None:
                self._checks_drafts = False
                return
            accepted = self._accept_drafted(choice, drafted, logits)
            choice.learn(len(drafted), accepted)
            self._draft_tokens += len(drafted)
            self._accepted_draft_tokens += accepted

    def _accept_drafted(self, choice: Choice, drafted: Sequence[int], logits: FloatArray) -> int:
        """Draw tokens until one differs from the draft, or the answer ends. Return how many were drafted."""
        for accepted, row in enumerate(logits):
            choice.cached += 1
            self._accept([choice], [row])
            if choice not in self._slots.active or choice.last_id != [*drafted, None][accepted]:
                return accepted
        return len(drafted)

    def _accept(self, choices: Sequence[Choice], logits: Sequence[FloatArray] | FloatArray) -> None:
        """Draw a token for each answer from its logits [vocab]. Frees slots before it reports that answers ended."""
        results = [_next_delta(choice, row) for choice, row in zip(choices, logits, strict=True)]
        answers = list(zip(choices, results, strict=True))
        ended = [(choice, result) for choice, result in answers if _ends_answer(result)]
        if ended:
            failed = [choice.request for choice, result in ended if isinstance(result, Exception)]
            self._slots.retire(failed, sound=False)
            requests = [choice.request for choice, result in ended if _ends_request(result)]
            self._slots.retire(requests, [choice for choice, _ in ended])
        for choice, result in answers:
            self._deliver(choice.request, result)

    # --- telling the caller ------------------------------------------------------------------------------------------

    def _deliver(self, request: Request, result: Delta | Exception) -> None:
        if request.state is State.ENDED:  # another of its answers has failed in this step
            return
        if isinstance(result, Exception):
            self._drop(request, result)
        elif _ends_request(result):
            self._delivery.complete(request, result)
        elif error := self._delivery.show(request, result):
            self._drop(request, error)

    def _drop(self, request: Request, error: Exception) -> None:
        self._slots.retire([request], sound=False)
        self._delivery.fail(request, error)


def _is_ready(request: Request) -> bool:
    return request.state is State.READY


def _next_delta(choice: Choice, logits: FloatArray) -> Delta | Exception:
    """Accept the next token of one answer; return its error, so that the other requests go on."""
    try:
        return choice.accept(logits)
    except Exception as error:
        return error


def _ends_answer(result: Delta | Exception) -> bool:
    return isinstance(result, Exception) or result.finish_reason is not None


def _ends_request(result: Delta | Exception) -> bool:
    """Return whether all answers of the request have ended, or must end with this error."""
    return isinstance(result, Exception) or result.usage is not None
