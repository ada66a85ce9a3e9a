"""Pins what this backend uses of TensorRT-LLM's executor: classes, parameters and attributes, and nothing else.

The classes below have the names of those in `tensorrt_llm.bindings.executor`, and list the parameters that this backend
passes. mypy checks every call of this backend against them; the tests bind every call that runs, and compare the table
with the real package where that is installed.

Provenance. Every name was READ in the source of the bindings (cpp/tensorrt_llm/nanobind/executor: request.cpp,
executor.cpp, executorConfig.cpp, bindings.cpp), in a state of the 1.2 line: `Request` has cache_salt_id already. The
tag 1.2.1 itself was not read. A comment says where the meaning of a line comes from: READ in the C++ source of that
state, or UNCONFIRMED, which no source that was read says. Nothing of it has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

VERSION = "1.2.1"  # the last version with engines: later ones run models with PyTorch only
CONTAINERS = tuple(
    f"nvcr.io/nvidia/tritonserver:{tag}-trtllm-python-py3" for tag in ("26.04", "26.05", "26.06", "26.07")
)
CONTAINER = CONTAINERS[-1]

Tensor = Any  # a torch tensor: the bindings convert no other kind

# samplingTopKKernels: a larger top_k is cut to this number with a warning in the log (READ)
MAX_TOP_K = 1024
# begins the error that every active request gets when a step of the engine fails (READ, executorImpl.cpp); errors of
# one request begin otherwise
STEP_FAILED = "Encountered an error in forward"


class SamplingConfig:
    """Says how tokens are drawn."""

    def __init__(
        self,
        *,
        top_k: int | None = None,  # 0: off, if top_p is given; 1: greedy (READ, samplingLayer.cpp)
        top_p: float | None = None,  # 1: off; both None: greedy
        min_p: float | None = None,  # applied before top_k and top_p (READ, samplingLayer.cpp)
        temperature: float | None = None,
        repetition_penalty: float | None = None,  # over prompt and answer, ids of the vocabulary only (READ)
        seed: int | None = None,  # uint64; None: the same seed for every request
    ) -> None:
        raise NotImplementedError


class OutputConfig:
    """Says what a response holds."""

    def __init__(
        self,
        *,
        return_generation_logits: bool = False,  # needs ExecutorConfig's gather_generation_logits (READ)
        exclude_input_from_output: bool = False,  # True: output_token_ids begin with the answer
    ) -> None:
        raise NotImplementedError


class PromptTuningConfig:
    """Holds the image embeddings of a request: token id vocab_size + k is row k of the table."""

    def __init__(
        self,
        embedding_table: Tensor,  # [P, hidden], in the model's dtype, or the executor throws (READ)
        # one per token of the prompt, 0 for text: part of the key under which KV blocks are reused; needed with a table
        # where reuse is on (READ, llmRequest.cpp)
        input_token_extra_ids: list[int] | None = None,
    ) -> None:
        raise NotImplementedError


class Request:
    """Holds one request."""

    def __init__(
        self,
        input_token_ids: list[int],
        max_tokens: int,
        *,
        streaming: bool = False,
        sampling_config: SamplingConfig,
        output_config: OutputConfig,
        end_id: int | None = None,  # -1: none; a token of this id ends the answer and is not in the output (READ)
        pad_id: int | None = None,
        bad_words: list[list[int]] | None = None,  # sequences that are never generated; of one id: the id never
        stop_words: list[list[int]] | None = None,  # the one that ends the answer is in the output (READ)
        prompt_tuning_config: PromptTuningConfig | None = None,
        # cross-attended tokens [C, hidden]: without an encoder engine they become the encoder's output (READ)
        encoder_input_features: Tensor | None = None,
        encoder_output_length: int | None = None,  # C
        # bool [S, C] on the GPU; True: attend. Chunks of a prompt take their rows, generated tokens the last one. The
        # engine gets the rows of all requests of a step as wide as the longest C, and the columns behind a request's
        # own C are True there: the model has to count columns (READ, transformerBuffers.cpp).
        cross_attention_mask: Tensor | None = None,
        skip_cross_attn_blocks: Tensor | None = None,  # bool [1] on the CPU
    ) -> None:
        raise NotImplementedError


class FinishReason:
    """Why an answer ended."""

    NOT_FINISHED: Any
    END_ID: Any
    STOP_WORDS: Any
    LENGTH: Any
    TIMED_OUT: Any
    CANCELLED: Any


class Result:
    """Holds the next tokens of a request that streams."""

    is_final: bool
    output_token_ids: list[list[int]]  # [beams][new tokens]
    generation_logits: Tensor | None  # [new tokens, beams, padded vocab], before penalties (the order is UNCONFIRMED)
    finish_reasons: list[Any]  # [beams] of FinishReason


class Response:
    """Holds the next tokens, or the error, of one request."""

    request_id: int
    error_msg: str  # may be read only if has_error
    result: Result  # may be read only if not has_error

    def has_error(self) -> bool:
        raise NotImplementedError


class KvCacheConfig:
    """Sizes the paged KV cache."""

    def __init__(
        self,
        *,
        enable_block_reuse: bool = True,
        max_tokens: int | None = None,  # the cache takes no more memory than these tokens need
        cross_kv_cache_fraction: float | None = None,  # must be given for a model with cross-attention (READ)
    ) -> None:
        raise NotImplementedError


class CommunicationType:
    MPI: Any


class CommunicationMode:
    LEADER: Any  # rank 0 takes the requests
    ORCHESTRATOR: Any


class ParallelConfig:
    """Says how the ranks of an engine talk."""

    def __init__(
        self,
        *,
        communication_type: Any,
        communication_mode: Any,
        device_ids: list[int] | None = None,  # None: rank r runs on GPU r of its node
    ) -> None:
        raise NotImplementedError


class ExecutorConfig:
    """Configures an executor."""

    def __init__(
        self,
        *,
        max_beam_width: int = 1,
        kv_cache_config: KvCacheConfig,
        enable_chunked_context: bool = False,
        normalize_log_probs: bool = True,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        parallel_config: ParallelConfig | None = None,
        gather_generation_logits: bool = False,
    ) -> None:
        raise NotImplementedError


class ModelType:
    DECODER_ONLY: Any


class Executor:
    """Runs an engine: batches, caches and samples by itself, on a thread of its own."""

    # Every rank makes one. All wait for each other; the world of MPI must have as many ranks as the engine (READ).
    def __init__(self, model_path: Path, model_type: Any, executor_config: ExecutorConfig) -> None:
        raise NotImplementedError

    def can_enqueue_requests(self) -> bool:
        """Return True on the leader."""
        raise NotImplementedError

    def enqueue_request(self, request: Request) -> int:
        """Return the id of the request in its responses."""
        raise NotImplementedError

    def await_responses(self, timeout: timedelta | None = None) -> list[Response]:
        """Return the responses that are ready; none after `timeout`. Lets other Python threads run meanwhile (READ)."""
        raise NotImplementedError

    def cancel_request(self, id: int) -> None:
        """End a request before the next step. Its last response has the reason CANCELLED (READ)."""
        raise NotImplementedError

    def shutdown(self) -> None:
        """On the leader, end the executors of all ranks once the active requests have ended. On another rank, wait
        until then (READ)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bindings:
    """Holds the classes of `tensorrt_llm.bindings.executor`."""

    sampling_config: type[SamplingConfig]
    output_config: type[OutputConfig]
    prompt_tuning_config: type[PromptTuningConfig]
    request: type[Request]
    finish_reason: type[FinishReason]
    kv_cache_config: type[KvCacheConfig]
    communication_type: type[CommunicationType]
    communication_mode: type[CommunicationMode]
    parallel_config: type[ParallelConfig]
    executor_config: type[ExecutorConfig]
    model_type: type[ModelType]
    executor: type[Executor]

    @classmethod
    def of(cls, module: Any) -> Bindings:
        """Find the classes in a module. Raises AttributeError for one that the module lacks."""
        return cls(
            sampling_config=module.SamplingConfig,
            output_config=module.OutputConfig,
            prompt_tuning_config=module.PromptTuningConfig,
            request=module.Request,
            finish_reason=module.FinishReason,
            kv_cache_config=module.KvCacheConfig,
            communication_type=module.CommunicationType,
            communication_mode=module.CommunicationMode,
            parallel_config=module.ParallelConfig,
            executor_config=module.ExecutorConfig,
            model_type=module.ModelType,
            executor=module.Executor,
        )
