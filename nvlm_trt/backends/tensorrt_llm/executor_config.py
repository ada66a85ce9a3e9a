"""Configures the executor of an engine, the same on every rank."""

from __future__ import annotations

from nvlm_trt.backends.tensorrt_llm.contract import Bindings, ExecutorConfig, ParallelConfig
from nvlm_trt.backends.tensorrt_llm.record import TrtLlmRecord
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig

# KV is held in blocks of tokens, of 32 or 64 by default; a sequence fills its last one in part
_BLOCK = 64


def executor_config(
    bindings: Bindings, config: NvlmConfig, limits: EngineLimits, record: TrtLlmRecord, device: str
) -> ExecutorConfig:
    """Configure paged KV for all slots, chunked prefill, and how ranks find each other and their GPUs.

    Raises EngineError for a GPU that is named for an engine of several."""
    return bindings.executor_config(
        max_beam_width=1,
        kv_cache_config=bindings.kv_cache_config(
            # by token ids and image digests; the executor knows no digest of what is cross-attended
            enable_block_reuse=not config.cross_layers,
            # all slots and no more: by default the executor takes most of the GPU, which the vision encoder shares
            max_tokens=cached_tokens(limits, record),
            cross_kv_cache_fraction=_cross_fraction(config, limits, record) if config.cross_layers else None,
        ),
        enable_chunked_context=True,
        normalize_log_probs=False,  # logprobs are computed from the logits
        max_batch_size=limits.max_slots,
        max_num_tokens=record.max_num_tokens,
        parallel_config=_parallel(bindings, record, device),
        gather_generation_logits=True,
    )


def _parallel(bindings: Bindings, record: TrtLlmRecord, device: str) -> ParallelConfig | None:
    _, colon, number = device.partition(":")
    if record.ranks > 1 and colon:
        raise EngineError(f"the engine runs on {record.ranks} GPUs, one per rank, not on {device!r}; name no device")
    if record.ranks == 1 and not colon:
        return None
    return bindings.parallel_config(
        communication_type=bindings.communication_type.MPI,
        communication_mode=bindings.communication_mode.LEADER,
        device_ids=[int(number)] if colon else None,
    )


def cached_tokens(limits: EngineLimits, record: TrtLlmRecord) -> int:
    """Return the tokens that each pool of the KV cache holds: those of all slots, in whole blocks. One number bounds
    the pools of self-attention and of cross-attention."""
    longest = max(limits.max_seq_len, record.max_encoder_len)
    return limits.max_slots * -(-longest // _BLOCK) * _BLOCK


def _cross_fraction(config: NvlmConfig, limits: EngineLimits, record: TrtLlmRecord) -> float:
    """Return the share of the memory for KV that cross-attention needs when all slots are full."""
    crossed = len(config.cross_layers) * record.max_encoder_len
    return crossed / (crossed + config.llm.num_layers * limits.max_seq_len)
