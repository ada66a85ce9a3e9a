"""Computes the memory of every GPU of an engine that is split over tp x pp GPUs, and how many requests fit.

Weights and caches are exact; activations are an estimate, as in `memory`. The runtime pages the KV cache, so requests
that do not fit wait: an engine fits if it holds its weights and one request of max_seq_len.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nvlm_trt.backends.spec import BackendSpec
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.parallel import check_parallel, pipeline_sizes, tensor_sizes
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.gpus import Gpu, refused
from nvlm_trt.planner.memory import IMAGE_CACHE, plan_engine
from nvlm_trt.planner.shards import StageShards, has_fp8_cache
from nvlm_trt.prompt.image_tokens import count_image_tokens

# Share of a GPU's memory for an engine. The rest is the CUDA context, NCCL's buffers, the allocator's gaps, and what
# TensorRT-LLM leaves by default (it gives caches 0.9 of what is free).
USABLE_SHARE = 0.9
TOKENS_PER_BLOCK = 32  # of the paged KV cache, trtllm-build's default
_MOST_GPUS = 64


@dataclass(frozen=True)
class GpuMemory:
    """Counts the bytes on one GPU: the first one of a pipeline stage, which has the most."""

    stage: int
    layers: int  # of the LLM, cross-attention blocks included
    weights: int
    vision_encoder: int  # with its activations and the image cache; on the first GPU alone
    prompt_table: int  # image embeddings of all requests; on the first stage alone
    activations: int
    kv_per_request: int  # of max_seq_len tokens
    cross_kv_per_request: int  # of max_image_tokens tokens

    @property
    def fixed(self) -> int:
        return self.weights + self.vision_encoder + self.prompt_table + self.activations

    @property
    def per_request(self) -> int:
        return self.kv_per_request + self.cross_kv_per_request

    def total(self, requests: int) -> int:
        return self.fixed + requests * self.per_request


@dataclass(frozen=True)
class FleetPlan:
    """The memory of each pipeline stage's first GPU. The other `tp - 1` GPUs of a stage hold the same, the first
    stage's without the vision encoder."""

    tp: int
    pp: int
    stages: tuple[GpuMemory, ...]

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def requests_that_fit(self, memory: float, share: float = USABLE_SHARE) -> int:
        """Count the requests of the most tokens that GPUs of `memory` bytes hold at once; negative if not even the
        weights fit."""
        return min(int((share * memory - stage.fixed) // stage.per_request) for stage in self.stages)


def plan_fleet(design: EngineDesign, tp: int, pp: int) -> FleetPlan:
    """Compute the memory of each GPU. Raises EngineError for a `tp` or `pp` that does not split the LLM evenly."""
    check_parallel(design.config, tp, pp)
    return _split(design, _vision_encoder(design), tp, pp)


def _vision_encoder(design: EngineDesign) -> int:
    return plan_engine(design).stages["vision_encoder"].total + IMAGE_CACHE


def _split(design: EngineDesign, vision: int, tp: int, pp: int) -> FleetPlan:
    config, limits, size = design.config, design.limits, design.number_size
    stages = []
    for number in range(pp):
        shards = StageShards(config, design.precisions, tp, pp, number)
        kinds = [kind for kind, _ in shards.layers]
        head = 2 * shards.kv_heads * config.llm.head_dim  # elements of one token's keys and values in one layer
        stages.append(
            GpuMemory(
                stage=number,
                layers=len(kinds),
                weights=sum(shard.nbytes for shard in shards),
                vision_encoder=vision if number == 0 else 0,
                prompt_table=_prompt_table(design) if number == 0 else 0,
                activations=_activations(design, shards, tp),
                kv_per_request=kinds.count("self") * head * kv_bytes(design) * _paged(limits.max_seq_len),
                cross_kv_per_request=kinds.count("cross") * head * size * _paged(limits.max_image_tokens),
            )
        )
    return FleetPlan(tp, pp, tuple(stages))


def kv_bytes(design: EngineDesign) -> int:
    """Return the bytes of a number in the caches."""
    return 1 if has_fp8_cache(design.config, design.precisions) else design.number_size


@dataclass(frozen=True)
class Choice:
    """A precision and the smallest fleet in which it fits."""

    precision: str
    tp: int
    pp: int
    requests: int  # of max_seq_len, at once


def splits(backend: BackendSpec) -> bool:
    """Return whether an engine of this backend is split over GPUs: whether its builds have the options tp and pp."""
    return {"tp", "pp"} <= backend.build_options.keys()


def what_fits(design: EngineDesign, gpu: Gpu, share: float) -> list[Choice]:
    """Return the smallest fleet of `gpu` for each precision of the backend that fits in one, of at most 64 GPUs."""
    config, table = design.config, design.backend.precisions

    def fitting() -> Iterator[Choice]:
        for name in table.names:
            other = design.with_precisions(table.parse(name))
            if refused(gpu, other.precisions, split=True, crosses=bool(config.cross_layers)):
                continue
            vision = _vision_encoder(other)
            for tp, pp in fleets(config, gpu):
                requests = _split(other, vision, tp, pp).requests_that_fit(gpu.memory.value, share)
                if requests >= 1:
                    yield Choice(name, tp, pp, requests)
                    break

    return list(fitting())


def fleets(config: NvlmConfig, gpu: Gpu) -> list[tuple[int, int]]:
    """Return (tp, pp) of each fleet of at most 64 GPUs that splits the LLM evenly, the smallest first.

    Among fleets of one size, the one with the fewest pipeline stages; tensor parallelism stays in a node."""
    sizes = sorted(
        (tp * pp, pp, tp)
        for tp in tensor_sizes(config)
        for pp in pipeline_sizes(config)
        if tp <= gpu.per_node and tp * pp <= _MOST_GPUS
    )
    return [(tp, pp) for _, pp, tp in sizes]


def _paged(tokens: int) -> int:
    return -(-tokens // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK


def _prompt_table(design: EngineDesign) -> int:
    """Count the bytes of the prompt table: for each request, the embeddings of as many images as max_seq_len holds."""
    config, limits = design.config, design.limits
    in_llm, _ = count_image_tokens(config, config.tiles_per_image, 0)
    rows = limits.max_slots * (limits.max_seq_len // in_llm) * in_llm if in_llm else 0
    return rows * config.llm.hidden_size * design.number_size


def _activations(design: EngineDesign, shards: StageShards, tp: int) -> int:
    """Estimate the bytes of the widest point of a layer, the logits of all requests, and the image features that
    cross-attention reads while one request is prefilled."""
    llm, limits, size = design.config.llm, design.limits, design.number_size
    tokens = max(min(design.backend.prefill_chunk, limits.max_seq_len), limits.max_slots)
    attention = 2 * (shards.heads + 2 * shards.kv_heads) * llm.head_dim
    ffn = 3 * llm.intermediate_size // tp
    logits = limits.max_slots * llm.vocab_size * 4  # float32, gathered on each rank
    features = limits.max_image_tokens * llm.hidden_size * size if design.config.cross_layers else 0
    return tokens * (2 * llm.hidden_size + max(attention, ffn)) * size + logits + features
