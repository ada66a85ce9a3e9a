"""Computes the memory of an engine before it is built: bytes of weights, caches and activations.

Weights and caches are exact: counted from the checkpoint's layout and the engine's limits. Activations are an estimate:
the widest point of a layer for the most tokens that a stage runs at once, without attention scores. The memory that a
process takes without an engine (a CUDA context, an interpreter) is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nvlm_trt.backends.base import STAGES
from nvlm_trt.backends.spec import StageWeights, Weight
from nvlm_trt.model.components import PARTS, part_of
from nvlm_trt.model.layout import EMBEDDING, checkpoint_layout
from nvlm_trt.model.precision import BLOCK, FLOAT_BYTES, WEIGHT_ONLY_BITS, needs_calibration, quantised_components
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.prompt.image_tokens import count_image_tokens

IMAGE_CACHE = 512 << 20  # bytes

_CROSS_KV = re.compile(r"language_model\.cross_layers\.\d+\.attn\.(k_proj|v_proj|k_norm)\.")


@dataclass(frozen=True)
class StageMemory:
    """Counts the bytes of a stage (a graph of the engine) while it runs."""

    weights: int  # held for as long as the engine is open
    caches: int
    activations: int
    mapped: int = 0  # pages of the engine's files, which the system may drop and read again
    overhead: int = 0  # of the runtime itself
    read: int = 0  # bytes of weights that a run reads

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.activations + self.mapped + self.overhead

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


def plan_engine(design: EngineDesign, checkpoint: int | None = None) -> EnginePlan:
    """Compute the memory of an engine. `checkpoint`: bytes of its checkpoint's files, None: 2 per parameter."""
    memory = design.backend.memory
    parameters, weights = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for tensor in _tensors(design):
        parameters[tensor.component] += tensor.parameters
        weights[tensor.component] += tensor.nbytes
    weights_of = stage_weights(design)
    self_cache, cross_cache = _caches(design)
    activations = _activations(design)
    loaded = _loaded(design)
    stages = {
        stage: StageMemory(
            weights=loaded[stage].held,
            caches=self_cache + cross_cache if stage == "decoder" else 0,
            activations=activations[stage],
            mapped=loaded[stage].mapped,
            overhead=((design.encoder if stage == "vision_encoder" else None) or memory).overhead,
            read=loaded[stage].read,
        )
        for stage in weights_of
    }
    running = building = sum(stage.total for stage in stages.values())
    if quantised_components(design.precisions):
        building = max(building, plan_engine(design.unquantised).peak_building)
    total = sum(parameters.values())
    host = memory.host_building(list(weights_of.values()), total, needs_calibration(design.precisions))
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


def stage_weights(design: EngineDesign) -> dict[str, StageWeights]:
    """Count the weights of each stage, each in the precision in which it is loaded."""
    stages = dict.fromkeys(STAGES, StageWeights())
    for tensor in _tensors(design.loaded):
        stored = StageWeights(tensor.nbytes)
        if tensor.in_blocks:
            stored = StageWeights(tensor.nbytes, tensor.nbytes, tensor.parameters, tensor.in_blocks)
        stages[tensor.stage] += stored
    return {stage: stored for stage, stored in stages.items() if stored.nbytes}


# --- weights -----------------------------------------------------------------------------------------------------


@dataclass
class _Loaded:
    held: int = 0
    mapped: int = 0
    read: int = 0


def _loaded(design: EngineDesign) -> dict[str, _Loaded]:
    """Count, by stage, what the runtime holds and maps of the weights, and what a run reads of them."""
    stages = {stage: _Loaded() for stage in STAGES}
    for tensor in _tensors(design.loaded):
        encoder = design.encoder if tensor.stage == "vision_encoder" else None
        loaded = (encoder or design.backend.memory).load(tensor.weight)
        stage = stages[tensor.stage]
        stage.held += loaded.held
        stage.mapped += loaded.mapped
        # a token looks up one row of the embedding table; only a tied lm_head reads the whole table
        if tensor.component != "embedding" or tensor.weight.tied:
            stage.read += encoder.read(tensor.weight) if encoder else tensor.nbytes
    return stages


@dataclass(frozen=True)
class _Tensor:
    """A tensor that the engine stores."""

    stage: str
    parameters: int  # of the checkpoint: a tied lm_head has none
    weight: Weight
    in_blocks: int = 0  # numbers in a weight-only tensor

    @property
    def component(self) -> str:
        return self.weight.component

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def _tensors(design: EngineDesign) -> Iterator[_Tensor]:
    """Yield each tensor that the engine stores."""
    config, precisions, size = design.config, design.precisions, design.number_size
    llm = config.llm
    tied = llm.tie_word_embeddings and precisions["lm_head"] in FLOAT_BYTES  # lm_head is the embedding table

    def stored(name: str, shape: tuple[int, ...], component: str, stage: str, parameters: int) -> _Tensor:
        precision, linear = precisions.get(component, ""), is_linear(name, shape)
        blocked = design.backend.memory.standard_blocks
        if (component, precision) == ("lm_head", "int8-weight-only") and not blocked:
            precision = "int8"  # one scale per output, no blocks
        blocks = precision in WEIGHT_ONLY_BITS and linear
        if blocks:
            nbytes = _blocked(shape, precision, size if blocked else None)
        else:
            nbytes = _stored(name, shape, precision, size)
        quantised = linear and precision not in FLOAT_BYTES
        numbers = math.prod(shape)
        weight = Weight(component, numbers, nbytes, linear, quantised, tied and name == EMBEDDING)
        return _Tensor(stage, parameters, weight, in_blocks=numbers if blocks else 0)

    for name, shape in checkpoint_layout(config).items():
        yield stored(name, shape, part_of(name), stage_of_tensor(name), math.prod(shape))
    if llm.tie_word_embeddings and not tied:
        yield stored("lm_head.weight", (llm.vocab_size, llm.hidden_size), "lm_head", "decoder", 0)
    positions = design.limits.max_seq_len * llm.head_dim  # cos and sin
    yield _Tensor("decoder", 0, Weight("decoder", positions, positions * size, multiplied=False))
    if config.architecture == "H":
        tags = config.max_tiles * design.tag_length * llm.hidden_size
        yield _Tensor("cross_kv", 0, Weight("cross_attention", tags, tags * size, multiplied=False))


def stage_of_tensor(name: str) -> str:
    if part_of(name) in ("vision_encoder", "projector"):
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


def _caches(design: EngineDesign) -> tuple[int, int]:
    """Return the bytes of the keys and values of all slots: self-attention's, cross-attention's."""
    llm, limits = design.config.llm, design.limits
    token = 2 * llm.num_kv_heads * llm.head_dim * design.number_size  # in one layer
    cross_tokens = cache_length(limits.max_image_tokens)
    return (
        limits.max_slots * limits.max_seq_len * llm.num_layers * token,
        limits.max_slots * cross_tokens * len(design.config.cross_layers) * token,
    )


def _activations(design: EngineDesign) -> dict[str, int]:
    """Estimate the bytes of each stage: the residual stream around a layer, and attention (queries, keys and values,
    projected and split into heads) or FFN, whichever is wider."""
    config, limits, size = design.config, design.limits, design.number_size
    vision, llm = config.vision, config.llm
    encoder = design.encoder
    tiles, encoder_size = design.backend.memory.encode_tiles or config.tiles_per_image, size
    if encoder:
        tiles, encoder_size = min(encoder.tiles, config.tiles_per_image), encoder.number_size
    layer = 2 * vision.hidden_size + max(6 * vision.hidden_size, 2 * vision.intermediate_size)
    projector = config.shuffled_size + 2 * (config.projector_width or 0)
    key = llm.num_kv_heads * llm.head_dim
    _, cross_tokens = count_image_tokens(config, config.tiles_per_image, design.tag_length)
    attention, ffn = 2 * (llm.num_heads * llm.head_dim + 2 * key), 3 * llm.intermediate_size
    tokens = max(min(design.backend.prefill_chunk, limits.max_seq_len), limits.max_slots)
    logits = limits.max_slots * llm.vocab_size * 4  # in float32
    return {
        "vision_encoder": tiles * max((vision.grid**2 + 1) * layer, config.tokens_per_tile * projector) * encoder_size,
        "cross_kv": cross_tokens * (llm.hidden_size + 2 * key * len(config.cross_layers)) * size,
        "decoder": tokens * (2 * llm.hidden_size + max(attention, ffn)) * size + logits,
    }
