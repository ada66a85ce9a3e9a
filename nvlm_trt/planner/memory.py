"""Computes the memory of an engine before it is built: bytes of weights, caches and activations.

Weights and caches are exact: counted from the checkpoint's layout and the engine's limits. Activations are an estimate:
the widest point of a layer for the most tokens that a stage runs at once, without attention scores. The memory that a
process takes without an engine (a CUDA context, an interpreter) is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nvlm_trt.backends.base import STAGES
from nvlm_trt.backends.spec import BackendSpec, MemoryModel, StageWeights
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, checkpoint_layout
from nvlm_trt.model.precision import (
    BLOCK,
    FLOAT_BYTES,
    WEIGHT_ONLY_BITS,
    floating_type,
    needs_calibration,
    quantised_components,
)
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.prompt.image_tokens import count_image_tokens

IMAGE_CACHE = 512 << 20  # bytes

# The components of --precision, and the embedding table, which is always stored in floating point.
_COMPONENTS = {
    "vision_encoder": r"vision_model\.",
    "projector": r"mlp1\.",
    "embedding": re.escape(EMBEDDING),
    "decoder": r"language_model\.model\.(layers|norm)\.",
    "lm_head": r"language_model\.lm_head\.",
    "cross_attention": r"language_model\.cross_layers\.",
}
_CROSS_KV = re.compile(r"language_model\.cross_layers\.\d+\.attn\.(k_proj|v_proj|k_norm)\.")


@dataclass(frozen=True)
class StageMemory:
    """Counts the bytes that a stage (a graph of the engine) holds while it runs."""

    weights: int
    caches: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.activations

    def __str__(self) -> str:
        parts = (f"{nbytes / 1e9:.2f} GB" for nbytes in (self.total, self.weights, self.caches, self.activations))
        return "{} ({} of weights, {} of caches, about {} of activations)".format(*parts)


@dataclass(frozen=True)
class EnginePlan:
    """Counts bytes by component or stage, on the device of the backend's MemoryModel."""

    parameters: dict[str, int]  # numbers of parameters, by component
    weights: dict[str, int]  # in the engine's files, by component, scales and tables included
    stages: dict[str, StageMemory]
    self_cache: int
    cross_cache: int
    image_cache: int  # at most
    checkpoint: int  # read once for each engine that a build writes
    peak_building: int  # estimate for the smoke test, and for the gate, which also loads an unquantised engine
    peak_running: int  # estimate for a server
    host_building: int  # estimate, for a GPU: host memory of the builder, or of the calibration on the CPU


def plan_engine(
    config: NvlmConfig,
    limits: EngineLimits,
    precisions: Mapping[str, str],
    backend: BackendSpec,
    tag_length: int,
    checkpoint: int | None = None,
) -> EnginePlan:
    """Compute the memory of an engine. `precisions`: one per component; `tag_length`: tokens of an NVLM-H tile tag;
    `checkpoint`: bytes of its files, None: 2 per parameter."""
    memory = backend.memory
    floating = _stored_type(memory, precisions)
    size = FLOAT_BYTES[floating]
    parameters, weights = dict.fromkeys(_COMPONENTS, 0), dict.fromkeys(_COMPONENTS, 0)
    for tensor in _tensors(config, limits, precisions, tag_length, memory):
        parameters[tensor.component] += tensor.parameters
        weights[tensor.component] += tensor.nbytes
    weights_of = stage_weights(config, limits, precisions, memory, tag_length)
    self_cache, cross_cache = _caches(config, limits, size)
    activations = _activations(config, limits, size, backend, tag_length)
    stages = {
        stage: StageMemory(stored.nbytes, self_cache + cross_cache if stage == "decoder" else 0, activations[stage])
        for stage, stored in weights_of.items()
    }
    running = building = sum(stage.total for stage in stages.values())
    if quantised_components(precisions):
        plain = dict.fromkeys(precisions, floating)
        building = max(building, plan_engine(config, limits, plain, backend, tag_length).peak_building)
    total = sum(parameters.values())
    host = memory.host_building(list(weights_of.values()), total, needs_calibration(precisions))
    return EnginePlan(
        parameters={component: count for component, count in parameters.items() if count},
        weights={component: nbytes for component, nbytes in weights.items() if nbytes},
        stages=stages,
        self_cache=self_cache,
        cross_cache=cross_cache,
        image_cache=IMAGE_CACHE,
        checkpoint=2 * total if checkpoint is None else checkpoint,
        peak_building=building,
        peak_running=running + IMAGE_CACHE,
        host_building=host,
    )


def stage_weights(
    config: NvlmConfig, limits: EngineLimits, precisions: Mapping[str, str], memory: MemoryModel, tag_length: int
) -> dict[str, StageWeights]:
    """Count the weights of each stage when it is loaded. Takes the arguments of `plan_engine`."""
    stages = dict.fromkeys(STAGES, StageWeights())
    loaded = {component: memory.loaded_as.get(precision, precision) for component, precision in precisions.items()}
    for tensor in _tensors(config, limits, loaded, tag_length, memory):
        stored = StageWeights(tensor.nbytes)
        if tensor.in_blocks:
            stored = StageWeights(tensor.nbytes, tensor.nbytes, tensor.parameters, tensor.in_blocks)
        stages[tensor.stage] += stored
    return {stage: stored for stage, stored in stages.items() if stored.nbytes}


# --- memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """A tensor that the engine stores."""

    component: str
    stage: str
    parameters: int  # of the checkpoint: a tied lm_head has none
    nbytes: int
    in_blocks: int = 0  # numbers in a weight-only tensor


def _tensors(
    config: NvlmConfig,
    limits: EngineLimits,
    precisions: Mapping[str, str],
    tag_length: int,
    memory: MemoryModel,
) -> Iterator[_Tensor]:
    """Yield each tensor that the engine stores."""
    llm, size = config.llm, FLOAT_BYTES[_stored_type(memory, precisions)]

    def stored(name: str, shape: tuple[int, ...], component: str, stage: str, parameters: int) -> _Tensor:
        precision = precisions.get(component, "")
        if (component, precision) == ("lm_head", "int8-weight-only") and not memory.standard_blocks:
            precision = "int8"  # one scale per output, no blocks
        if precision in WEIGHT_ONLY_BITS and is_linear(name, shape):
            nbytes = _blocked(shape, precision, size if memory.standard_blocks else None)
            return _Tensor(component, stage, parameters, nbytes, in_blocks=math.prod(shape))
        return _Tensor(component, stage, parameters, _stored(name, shape, precision, size))

    for name, shape in checkpoint_layout(config).items():
        yield stored(name, shape, component_of_tensor(name), stage_of_tensor(name), math.prod(shape))
    if llm.tie_word_embeddings and precisions["lm_head"] not in FLOAT_BYTES:  # else lm_head is the embedding table
        yield stored("lm_head.weight", (llm.vocab_size, llm.hidden_size), "lm_head", "decoder", 0)
    positions = limits.max_seq_len * llm.head_dim * size  # cos and sin
    yield _Tensor("decoder", "decoder", 0, positions)
    if config.architecture == "H":
        tags = config.max_tiles * tag_length * llm.hidden_size * size
        yield _Tensor("cross_attention", "cross_kv", 0, tags)


def _stored_type(memory: MemoryModel, precisions: Mapping[str, str]) -> str:
    return memory.floating or floating_type(precisions)


def component_of_tensor(name: str) -> str:
    return next(component for component, pattern in _COMPONENTS.items() if re.match(pattern, name))


def stage_of_tensor(name: str) -> str:
    if component_of_tensor(name) in ("vision_encoder", "projector"):
        return "vision_encoder"
    return "cross_kv" if _CROSS_KV.match(name) else "decoder"


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) > 1 and name != EMBEDDING


def _stored(name: str, shape: tuple[int, ...], precision: str, size: int) -> int:
    """Compute the bytes of one tensor that has no blocks; `size`: bytes of a floating-point number."""
    outputs, inputs = shape[0], math.prod(shape[1:])
    if precision in ("int8", "fp8") and is_linear(name, shape):
        return outputs * (inputs + size + 1)  # each output has a scale and a zero point
    return outputs * inputs * size


def _blocked(shape: tuple[int, ...], precision: str, scale: int | None) -> int:
    """Compute the bytes of a weight in blocks of inputs. `scale`: bytes of a block's scale in standard operators, which
    have one scale per output where inputs fill no whole blocks; None: the blocks of MatMulNBits, filled up, with scales
    in float32."""
    outputs, inputs = shape[0], math.prod(shape[1:])
    bits, block = WEIGHT_ONLY_BITS[precision], BLOCK[WEIGHT_ONLY_BITS[precision]]
    if scale is None:
        return outputs * -(-inputs // block) * (block * bits // 8 + 4)
    if inputs % block:
        return outputs * (inputs + scale)
    return outputs * (inputs * bits // 8 + inputs // block * scale)


def _caches(config: NvlmConfig, limits: EngineLimits, size: int) -> tuple[int, int]:
    """Return the bytes of the keys and values of all slots: self-attention's, cross-attention's."""
    llm = config.llm
    token = 2 * llm.num_kv_heads * llm.head_dim * size  # in one layer
    cross_tokens = cache_length(limits.max_image_tokens)
    return (
        limits.max_slots * limits.max_seq_len * llm.num_layers * token,
        limits.max_slots * cross_tokens * len(config.cross_layers) * token,
    )


def _activations(
    config: NvlmConfig, limits: EngineLimits, size: int, backend: BackendSpec, tag_length: int
) -> dict[str, int]:
    """Estimate the bytes of each stage: the residual stream around a layer, and attention (queries, keys and values,
    projected and split into heads) or FFN, whichever is wider."""
    vision, llm = config.vision, config.llm
    tiles = backend.memory.encode_tiles or config.tiles_per_image
    layer = 2 * vision.hidden_size + max(6 * vision.hidden_size, 2 * vision.intermediate_size)
    projector = config.shuffled_size + 2 * (config.projector_width or 0)
    key = llm.num_kv_heads * llm.head_dim
    _, cross_tokens = count_image_tokens(config, config.tiles_per_image, tag_length)
    attention, ffn = 2 * (llm.num_heads * llm.head_dim + 2 * key), 3 * llm.intermediate_size
    tokens = max(min(backend.prefill_chunk, limits.max_seq_len), limits.max_slots)
    logits = limits.max_slots * llm.vocab_size * 4  # in float32
    return {
        "vision_encoder": tiles * max((vision.grid**2 + 1) * layer, config.tokens_per_tile * projector) * size,
        "cross_kv": cross_tokens * (llm.hidden_size + 2 * key * len(config.cross_layers)) * size,
        "decoder": tokens * (2 * llm.hidden_size + max(attention, ffn)) * size + logits,
    }
