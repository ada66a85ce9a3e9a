"""Plays TensorRT-LLM's executor on a CPU: its batching, its refusals and its responses, over the PyTorch oracle.

As the real one: a thread of its own; at most max_batch_size requests and max_num_tokens tokens in a step; prompts in
chunks; KV blocks reused by token ids and extra ids; cancelled requests end before the next step, and only once they are
active; an error in a step ends all active requests. Where the real one would warn and go on, this one refuses.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bound_classes import bind

from nvlm_trt.api import SamplingParams
from nvlm_trt.backends.tensorrt_llm import contract
from nvlm_trt.reference.decoder import Cache, KeyValue
from nvlm_trt.reference.model import ReferenceModel
from nvlm_trt.runtime.sampling import Sampler

BLOCK = 16  # tokens of a KV block
PADDING = 3  # columns of the logits behind the vocabulary, which no token may come from


@dataclass
class Sequence:
    """One active request."""

    number: int
    request: Any
    token_ids: list[int]
    extra_ids: list[int]
    ranges: torch.Tensor  # [S, 2], read from the mask
    cross_kv: list[KeyValue] | None
    sampler: Sampler
    cached: int = 0
    cache: Cache | None = None
    generated: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.token_ids)


class FakeExecutor:
    """Stands for `tensorrt_llm.bindings.executor.Executor`. Tests set the class's attributes."""

    module: Any = None  # of the classes that the product calls
    world_size = 1
    rank = 0
    device = "cpu"  # where masks, tables and features must be
    load_error: str | None = None
    models: dict[str, ReferenceModel] = {}  # noqa: RUF012 - shared by the executors of a test run

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        given = bind(contract.Executor.__init__, self, *arguments, **keywords)
        if self.load_error:
            raise RuntimeError(self.load_error)
        assert given["model_type"] is self.module.ModelType.DECODER_ONLY
        built = json.loads((given["model_path"] / "config.json").read_text())
        self.build, mapping = built["build_config"], built["pretrained_config"]["mapping"]
        ranks = mapping["tp_size"] * mapping["pp_size"]
        if ranks != self.world_size:
            raise RuntimeError("MPI worldSize is expected to be equal to tp*pp*cp")
        self.config = config = given["executor_config"]
        if ranks > 1:
            assert config.parallel_config.communication_mode is self.module.CommunicationMode.LEADER
        self.model = self._model(given["model_path"] / f"rank{self.rank}.engine")
        self.is_crossed = bool(self.model.config.cross_layers)
        assert config.kv_cache_config.enable_block_reuse is not self.is_crossed
        if self.is_crossed:
            assert 0 < config.kv_cache_config.cross_kv_cache_fraction < 1
        assert config.max_num_tokens <= self.build["max_num_tokens"]
        assert config.max_batch_size <= self.build["max_batch_size"]
        assert config.kv_cache_config.max_tokens >= config.max_batch_size * self.build["max_seq_len"]
        self.dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[built["pretrained_config"]["dtype"]]
        self.received: list[Any] = []
        self.cancelled: list[int] = []
        self.steps: list[tuple[int, int]] = []  # (requests that decode, prompt tokens) of each step
        self.reused = 0  # tokens whose KV came from an earlier request
        self.fail_with: str | None = None
        self.paused = threading.Event()  # set: no step begins
        self._blocks: dict[tuple[tuple[int, int], ...], Cache] = {}
        self._next_number = 1
        self._queued: list[tuple[int, Any]] = []
        self._active: list[Sequence] = []
        self._to_cancel: set[int] = set()
        self._responses: list[Any] = []
        self._changed = threading.Condition()
        self._shutdown = False
        self._released = False
        self.is_shut_down = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Goes on for ever, whatever pauses it."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    # --- what the product calls --------------------------------------------------------------------------------------

    def can_enqueue_requests(self) -> bool:
        return self.rank == 0

    def enqueue_request(self, *arguments: Any, **keywords: Any) -> int:
        request = bind(contract.Executor.enqueue_request, self, *arguments, **keywords)["request"]
        self._check_open()
        with self._changed:
            number, self._next_number = self._next_number, self._next_number + 1
            self.received.append(request)
            self._queued.append((number, request))
            self._changed.notify_all()
        return number

    def await_responses(self, *arguments: Any, **keywords: Any) -> list[Any]:
        timeout = bind(contract.Executor.await_responses, self, *arguments, **keywords)["timeout"]
        self._check_open()
        with self._changed:
            self._changed.wait_for(lambda: self._responses, timeout.total_seconds())
            taken, self._responses = self._responses, []
        return taken

    def cancel_request(self, *arguments: Any, **keywords: Any) -> None:
        number = bind(contract.Executor.cancel_request, self, *arguments, **keywords)["id"]
        self._check_open()
        with self._changed:
            self.cancelled.append(number)
            self._to_cancel.add(number)
            self._changed.notify_all()

    def shutdown(self) -> None:
        with self._changed:
            self._shutdown = True
            self._changed.notify_all()
        if self.rank == 0:
            self._thread.join(30)
            assert not self._thread.is_alive()
        self.is_shut_down = True

    def _check_open(self) -> None:
        if self.rank:
            raise RuntimeError("only the leader takes requests")
        if self._shutdown:
            raise RuntimeError("Shutdown called")

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._changed:
                    self._changed.wait_for(self._may_run)
                    if self._shutdown and not self._active:
                        return
                    self._cancel()
                    self._fetch()
                    active = list(self._active)
                try:
                    if self.fail_with:
                        raise RuntimeError(self.fail_with)
                    responses = self._step(active)
                except Exception as error:  # as terminateActiveRequests does
                    message = f"Encountered an error in forwardAsync function: {error}"
                    responses = [self._error(sequence.number, message) for sequence in active]
                    self._active = []
                with self._changed:
                    self._responses += responses
                    self._changed.notify_all()

    def _may_run(self) -> bool:
        if self._shutdown:
            return True
        return (self._released or not self.paused.is_set()) and bool(self._active or self._queued)

    def _cancel(self) -> None:
        """Only active requests: a queued one ends when it becomes active."""
        for sequence in [one for one in self._active if one.number in self._to_cancel]:
            self._to_cancel.discard(sequence.number)
            self._active.remove(sequence)
            self._responses.append(self._response(sequence.number, [], "CANCELLED"))

    def _fetch(self) -> None:
        while self._queued and len(self._active) < self.config.max_batch_size:
            number, request = self._queued.pop(0)
            try:
                self._active.append(self._sequence(number, request))
            except Exception as error:
                message = f"Encountered an error when fetching new request: {error}"
                self._responses.append(self._error(number, message))

    def _step(self, active: list[Sequence]) -> list[Any]:
        responses, prompt_tokens = [], 0
        decoding = [sequence for sequence in active if sequence.cached >= sequence.length]
        budget = self.config.max_num_tokens - len(decoding)
        for sequence in active:
            if sequence in decoding:
                last = sequence.generated[-1]
                responses.append(self._advance(sequence, [last], sequence.ranges[-1:]))
            elif budget > 0:
                chunk = slice(sequence.cached, min(sequence.cached + budget, sequence.length))
                size = chunk.stop - chunk.start
                assert self.config.enable_chunked_context or size == sequence.length - sequence.cached
                budget, prompt_tokens = budget - size, prompt_tokens + size
                response = self._advance(sequence, sequence.token_ids[chunk], sequence.ranges[chunk])
                if sequence.cached >= sequence.length:
                    responses.append(response)
        if active:
            self.steps.append((len(decoding), prompt_tokens))
        return responses

    # --- one request -------------------------------------------------------------------------------------------------

    def _sequence(self, number: int, request: Any) -> Sequence:
        config, vocab = self.model.config, self.model.config.llm.vocab_size
        length = len(request.input_token_ids)
        assert 0 < length <= self.build["max_seq_len"] - request.max_tokens, "exceeds max_seq_len"
        assert request.max_tokens > 0
        rows = 0
        if request.prompt_tuning_config is not None:
            table = request.prompt_tuning_config.embedding_table
            rows = len(table)
            self._check_tensor(table, self.dtype, (rows, config.llm.hidden_size))
            limit = self.build["max_prompt_embedding_table_size"] // self.build["max_batch_size"]
            assert 0 < rows <= limit, f"table of {rows} rows, the engine takes {limit}"
        assert all(0 <= token_id < vocab + rows for token_id in request.input_token_ids), "token id out of range"
        extra_ids = [0] * length
        if rows and self.config.kv_cache_config.enable_block_reuse:
            extra_ids = request.prompt_tuning_config.input_token_extra_ids
            assert extra_ids is not None, "extra ids must be provided when enabling kv cache reuse with prompt table"
            assert len(extra_ids) == length
            assert all(0 <= extra_id < 1 << 64 for extra_id in extra_ids)
        ranges, cross_kv = self._crossed(request, length)
        sequence = Sequence(
            number, request, request.input_token_ids, extra_ids, ranges, cross_kv, self._sampler(request)
        )
        self._reuse(sequence)
        return sequence

    def _crossed(self, request: Any, length: int) -> tuple[torch.Tensor, list[KeyValue] | None]:
        given = [request.encoder_input_features, request.encoder_output_length, request.cross_attention_mask,
                 request.skip_cross_attn_blocks]  # fmt: skip
        if not self.is_crossed:
            assert given == [None] * 4, "the engine has no cross-attention"
            return torch.zeros(length, 2, dtype=torch.int64), None
        features, columns, mask, skip = given
        assert all(one is not None for one in given), "one request of a batch without a mask takes it from all"
        self._check_tensor(features, self.dtype, (columns, self.model.config.llm.hidden_size))
        assert 0 < columns <= self.build["max_encoder_input_len"]
        self._check_tensor(mask, torch.bool, (length, columns))
        assert (skip.dtype, tuple(skip.shape), skip.device.type) == (torch.bool, (1,), "cpu")
        assert bool(skip) is not bool(mask.any()), "a request that attends may not be skipped"
        cross_kv = self.model.language_model.cross_kv(features.float())
        return ranges_of(mask), cross_kv

    def _check_tensor(self, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), (tensor.dtype, tensor.shape, dtype, shape)
        assert tensor.device.type == self.device, f"a tensor on {tensor.device}"

    def _sampler(self, request: Any) -> Sampler:
        """The product's own sampler: the real executor's draws are other ones for the same seed."""
        given = request.sampling_config
        assert given.top_k != 0 or given.top_p is not None, "would be greedy"
        is_greedy = given.top_k == 1
        params = SamplingParams(
            temperature=0.0 if is_greedy else float(given.temperature),
            top_k=given.top_k if not is_greedy else 0,
            top_p=given.top_p or 1.0,
            min_p=given.min_p or 0.0,
            repetition_penalty=given.repetition_penalty or 1.0,
            seed=given.seed,
        )
        banned = {word[0] for word in request.bad_words or [] if len(word) == 1}
        in_vocabulary = [i for i in request.input_token_ids if i < self.model.config.llm.vocab_size]
        return Sampler(params, np.array(in_vocabulary, np.int64), banned)

    def _advance(self, sequence: Sequence, token_ids: list[int], ranges: torch.Tensor) -> Any:
        """Runs tokens; returns the response with the next one."""
        model, vocab = self.model, self.model.config.llm.vocab_size
        ids = torch.tensor(token_ids)
        x = model.language_model.embed(ids.clamp(max=vocab - 1))  # [S, hidden]
        in_table = ids >= vocab
        if in_table.any():
            x[in_table] = sequence.request.prompt_tuning_config.embedding_table[ids[in_table] - vocab].float()
        logits, sequence.cache = model.language_model(x[None], sequence.cross_kv, ranges[None], sequence.cache)
        sequence.cached += len(token_ids)
        if sequence.cached < sequence.length:
            return None
        self._store(sequence)
        row = logits[0, -1]  # [vocab]
        token_id, _ = sequence.sampler.sample(row.numpy())
        sequence.generated.append(token_id)
        reason = self._reason(sequence, token_id)
        if reason:
            self._active.remove(sequence)
        return self._response(sequence.number, [token_id], reason, row if self._gives_logits(sequence) else None)

    def _gives_logits(self, sequence: Sequence) -> bool:
        wanted = sequence.request.output_config.return_generation_logits
        assert not wanted or self.config.gather_generation_logits
        return bool(wanted)

    def _reason(self, sequence: Sequence, token_id: int) -> str | None:
        if [token_id] in (sequence.request.stop_words or []):
            return "STOP_WORDS"
        if token_id == sequence.request.end_id:
            return "END_ID"
        return "LENGTH" if len(sequence.generated) == sequence.request.max_tokens else None

    # --- reuse of KV -------------------------------------------------------------------------------------------------

    def _keys(self, sequence: Sequence) -> list[tuple[tuple[int, int], ...]]:
        """One key per whole block of the prompt: all tokens up to its end, each with its extra id."""
        tokens = list(zip(sequence.token_ids, sequence.extra_ids, strict=True))
        return [tuple(tokens[:end]) for end in range(BLOCK, sequence.length + 1, BLOCK)]

    def _store(self, sequence: Sequence) -> None:
        if self.config.kv_cache_config.enable_block_reuse and not sequence.generated:
            assert sequence.cache is not None
            for key in self._keys(sequence):
                self._blocks[key] = [(k[:, :, : len(key)], v[:, :, : len(key)]) for k, v in sequence.cache]

    def _reuse(self, sequence: Sequence) -> None:
        """Takes the longest known prefix, but never the whole prompt: its last token gives the first logits."""
        if not self.config.kv_cache_config.enable_block_reuse:
            return
        known = [key for key in self._keys(sequence) if key in self._blocks and len(key) < sequence.length]
        if known:
            sequence.cached, sequence.cache = len(known[-1]), self._blocks[known[-1]]
            self.reused += sequence.cached

    # --- responses ---------------------------------------------------------------------------------------------------

    def _response(
        self, number: int, token_ids: list[int], reason: str | None, logits: torch.Tensor | None = None
    ) -> Any:
        padded = None if logits is None else torch.cat([logits, torch.full([PADDING], 1e4)])[None, None]
        result = SimpleNamespace(
            is_final=reason is not None,
            output_token_ids=[token_ids],
            generation_logits=padded,
            finish_reasons=[self.module.FinishReason[reason or "NOT_FINISHED"]],
        )
        return SimpleNamespace(request_id=number, has_error=lambda: False, result=result)

    def _error(self, number: int, message: str) -> Any:
        return SimpleNamespace(request_id=number, has_error=lambda: True, error_msg=message)

    def _model(self, file: Path) -> ReferenceModel:
        checkpoint = file.read_text()
        if checkpoint not in self.models:
            self.models[checkpoint] = ReferenceModel.from_checkpoint(checkpoint)
        return self.models[checkpoint]


def ranges_of(mask: torch.Tensor) -> torch.Tensor:
    """Reads the range [S, 2] of each row of a mask [S, C], which must be contiguous."""
    ranges = torch.zeros(len(mask), 2, dtype=torch.int64)
    for row, columns in enumerate(mask):
        places = columns.nonzero()[:, 0]
        if len(places):
            ranges[row] = torch.tensor([int(places[0]), int(places[-1]) + 1])
            assert len(places) == ranges[row, 1] - ranges[row, 0], f"row {row} has a hole"
    return ranges
