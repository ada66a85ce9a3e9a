"""Memory and roofline of an engine before it is built: bytes of weights, caches and activations; FLOPs and bytes moved.

Weights and caches are counted from the checkpoint's layout and the engine's limits: they are what the engine holds.
Activations are an estimate: the widest point of a layer for the most tokens that a stage runs at once, attention scores
never held. What a process takes before it holds anything (a CUDA context, an interpreter) is not counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nvlm_trt.engine import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, checkpoint_layout
from nvlm_trt.model.precision import (
    BLOCK,
    WEIGHT_ONLY_BITS,
    floating_type,
    needs_calibration,
    quantised_components,
)
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.prompt.encoder import count_image_tokens

PREFILL_CHUNK = 256  # tokens, and the default of RuntimeOptions
IMAGE_CACHE = 512 << 20  # bytes, and the default of RuntimeOptions

# By backend: the most tokens of a prompt, and the most tiles (None: an image's), that are run at once.
_CHUNK = {"onnxruntime": PREFILL_CHUNK, "tensorrt": 1024}
_TILES = {"onnxruntime": 2, "tensorrt": None}

# The components of --precision, and the embedding table, which is stored in floating point.
_COMPONENTS = {
    "vision_encoder": r"vision_model\.",
    "projector": r"mlp1\.",
    "embedding": re.escape(EMBEDDING),
    "decoder": r"language_model\.model\.(layers|norm)\.",
    "lm_head": r"language_model\.lm_head\.",
    "cross_attention": r"language_model\.cross_layers\.",
}
_CROSS_KV = re.compile(r"language_model\.cross_layers\.\d+\.attn\.(k_proj|v_proj|k_norm)\.")
_FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage (a graph of the engine) holds while it runs."""

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
    """Bytes, by component or stage. They are on the GPU for TensorRT, in host memory for ONNX Runtime."""

    parameters: dict[str, int]  # a number, by component
    weights: dict[str, int]  # in the engine's files, by component, scales and tables included
    stages: dict[str, StageMemory]
    self_cache: int
    cross_cache: int
    image_cache: int  # at most
    checkpoint: int  # read once for each engine that a build writes
    peak_building: int  # expected: the engine is tried, and a quantised one compared with an unquantised one
    peak_running: int  # expected of a server
    host_building: int  # for TensorRT, expected in host memory: the builder's, or that of the calibration, on the CPU


def plan_engine(
    config: NvlmConfig,
    limits: EngineLimits,
    precisions: Mapping[str, str],
    backend: str,
    tag_length: int,
    checkpoint: int | None = None,
) -> EnginePlan:
    """`precisions` is what `parse_precision` gives; `tag_length`: tokens of NVLM-H's tile tags; `checkpoint`: bytes of
    its files, None: 2 per parameter."""
    size = _FLOAT_BYTES[floating_type(precisions)]
    parameters, weights = dict.fromkeys(_COMPONENTS, 0), dict.fromkeys(_COMPONENTS, 0)
    for component, _, count, nbytes in _tensors(config, limits, precisions, tag_length):
        parameters[component] += count
        weights[component] += nbytes
    stage_weights = dict.fromkeys(("vision_encoder", "cross_kv", "decoder"), 0)
    for _, stage, _, nbytes in _tensors(config, limits, _when_loaded(precisions, backend), tag_length):
        stage_weights[stage] += nbytes
    self_cache, cross_cache = _caches(config, limits, size)
    activations = _activations(config, limits, size, backend, tag_length)
    stages = {
        stage: StageMemory(nbytes, self_cache + cross_cache if stage == "decoder" else 0, activations[stage])
        for stage, nbytes in stage_weights.items()
        if nbytes
    }
    loaded = building = sum(stage.total for stage in stages.values())
    if quantised_components(precisions):
        plain = dict.fromkeys(precisions, floating_type(precisions))
        building = max(building, plan_engine(config, limits, plain, backend, tag_length).peak_building)
    # keys and values of X wait on the host, the image tokens of D and H on the GPU
    image_cache = 0 if (backend, config.architecture) == ("tensorrt", "X") else IMAGE_CACHE
    total = sum(parameters.values())
    # TensorRT's builder holds its network's weights and those of the plan (developer guide, "The Build Phase")
    host = max(2 * max(stage_weights.values()), 4 * total if needs_calibration(precisions) else 0)
    return EnginePlan(
        parameters={component: count for component, count in parameters.items() if count},
        weights={component: nbytes for component, nbytes in weights.items() if nbytes},
        stages=stages,
        self_cache=self_cache,
        cross_cache=cross_cache,
        image_cache=image_cache,
        checkpoint=2 * total if checkpoint is None else checkpoint,
        peak_building=building,
        peak_running=loaded + image_cache,
        host_building=host if backend == "tensorrt" else 0,
    )


# --- memory ------------------------------------------------------------------------------------------------------


def _tensors(
    config: NvlmConfig, limits: EngineLimits, precisions: Mapping[str, str], tag_length: int
) -> Iterator[tuple[str, str, int, int]]:
    """(component, stage, parameters, bytes) of everything that the engine stores."""
    llm, size = config.llm, _FLOAT_BYTES[floating_type(precisions)]
    for name, shape in checkpoint_layout(config).items():
        component, count = _component(name), math.prod(shape)
        yield component, _stage(name), count, _stored(name, shape, precisions.get(component, ""), size)
    if llm.tie_word_embeddings and precisions["lm_head"] not in _FLOAT_BYTES:  # else it multiplies with the table
        shape = (llm.vocab_size, llm.hidden_size)
        yield "lm_head", "decoder", 0, _stored("lm_head.weight", shape, precisions["lm_head"], size)
    yield "decoder", "decoder", 0, limits.max_seq_len * llm.head_dim * size  # cos and sin of every position
    if config.architecture == "H":
        yield "cross_attention", "cross_kv", 0, config.max_tiles * tag_length * llm.hidden_size * size  # tags


def _when_loaded(precisions: Mapping[str, str], backend: str) -> dict[str, str]:
    """ONNX Runtime folds fp8 weights into float32 constants."""
    folded = {"fp8": "fp32"} if backend == "onnxruntime" else {}
    return {component: folded.get(precision, precision) for component, precision in precisions.items()}


def _component(name: str) -> str:
    return next(component for component, pattern in _COMPONENTS.items() if re.match(pattern, name))


def _stage(name: str) -> str:
    if _component(name) in ("vision_encoder", "projector"):
        return "vision_encoder"
    return "cross_kv" if _CROSS_KV.match(name) else "decoder"


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) > 1 and name != EMBEDDING


def _stored(name: str, shape: tuple[int, ...], precision: str, size: int) -> int:
    """Bytes of one tensor; `size` is that of a floating-point number."""
    outputs, inputs = shape[0], math.prod(shape[1:])
    if precision in WEIGHT_ONLY_BITS and _is_linear(name, shape):
        bits = WEIGHT_ONLY_BITS[precision]
        return outputs * -(-inputs // BLOCK[bits]) * (BLOCK[bits] * bits // 8 + 4)
    if precision in ("int8", "fp8") and _is_linear(name, shape):
        return outputs * (inputs + size + 1)  # a scale and a zero point for each output
    return outputs * inputs * size


def _caches(config: NvlmConfig, limits: EngineLimits, size: int) -> tuple[int, int]:
    """Of all slots: keys and values of self-attention, and of cross-attention."""
    llm = config.llm
    token = 2 * llm.num_kv_heads * llm.head_dim * size  # in one layer
    cross_tokens = cache_length(limits.max_image_tokens)
    return (
        limits.max_slots * limits.max_seq_len * llm.num_layers * token,
        limits.max_slots * cross_tokens * len(config.cross_layers) * token,
    )


def _activations(config: NvlmConfig, limits: EngineLimits, size: int, backend: str, tag_length: int) -> dict[str, int]:
    """By stage: what goes around a layer, and the wider of attention (queries, keys and values, projected and split
    into heads) and FFN."""
    vision, llm = config.vision, config.llm
    tiles = _TILES[backend] or config.tiles_per_image
    layer = 2 * vision.hidden_size + max(6 * vision.hidden_size, 2 * vision.intermediate_size)
    projector = config.shuffled_size + 2 * (config.projector_width or 0)
    key = llm.num_kv_heads * llm.head_dim
    _, cross_tokens = count_image_tokens(config, config.tiles_per_image, tag_length)
    attention, ffn = 2 * (llm.num_heads * llm.head_dim + 2 * key), 3 * llm.intermediate_size
    tokens = max(min(_CHUNK[backend], limits.max_seq_len), limits.max_slots)
    logits = limits.max_slots * llm.vocab_size * 4  # in float32
    return {
        "vision_encoder": tiles * max((vision.grid**2 + 1) * layer, config.tokens_per_tile * projector) * size,
        "cross_kv": cross_tokens * (llm.hidden_size + 2 * key * len(config.cross_layers)) * size,
        "decoder": tokens * (2 * llm.hidden_size + max(attention, ffn)) * size + logits,
    }


# --- roofline ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Floating-point (or integer) operations, a multiply-add being two, and bytes of weights and caches moved."""

    flops: float
    nbytes: float

    def seconds(self, bandwidth: float, flop_rate: float) -> float:
        """The least time at `bandwidth` bytes and `flop_rate` operations per second."""
        return max(self.flops / flop_rate, self.nbytes / bandwidth)


class Roofline:
    """What requests cost at least. Activations are counted as if they stayed in the processor's own memory."""

    def __init__(
        self, config: NvlmConfig, limits: EngineLimits, precisions: Mapping[str, str], backend: str, tag_length: int
    ) -> None:
        """Arguments as for `plan_engine`."""
        self._config, self._tag_length = config, tag_length
        self._size = _FLOAT_BYTES[floating_type(precisions)]
        plan = plan_engine(config, limits, precisions, backend, tag_length)
        self._weights = {stage: memory.weights for stage, memory in plan.stages.items()}
        # rows of the table are looked up; only a tied lm_head reads it whole
        if not config.llm.tie_word_embeddings or precisions["lm_head"] not in _FLOAT_BYTES:
            self._weights["decoder"] -= plan.weights["embedding"]
        self._multiplied = dict.fromkeys(("patches", "layers", "projector", "cross_kv", "decoder"), 0)
        for name, shape in checkpoint_layout(config).items():
            if _is_linear(name, shape) and _component(name) != "lm_head":
                self._multiplied[_rows_of(name)] += math.prod(shape)

    def prefill(self, text_tokens: int, tiles: int) -> dict[str, Work]:
        """By stage, one request of one image of `tiles` tiles (0: none), thumbnail included, and `text_tokens` that
        all read the whole image."""
        image_tokens, cross_tokens = count_image_tokens(self._config, tiles, self._tag_length)
        work = {"vision_encoder": self._encode(tiles)} if tiles else {}
        if cross_tokens:
            flops = 2 * cross_tokens * self._multiplied["cross_kv"]
            work["cross_kv"] = Work(flops, self._weights["cross_kv"] + cross_tokens * self._cross_token)
        tokens = text_tokens + image_tokens
        ends = [*range(PREFILL_CHUNK, tokens, PREFILL_CHUNK), tokens]
        nbytes = sum(
            self._weights["decoder"] + end * self._self_token + cross_tokens * self._cross_token for end in ends
        )
        pairs = tokens * (tokens + 1) // 2
        work["decoder"] = Work(self._decoder_flops(tokens, pairs, tokens * cross_tokens, rows=1), nbytes)
        return work

    def decode(self, sequences: int, tokens: int, cross_tokens: int) -> Work:
        """One token of each of `sequences` that have `tokens` in the cache, the new one included, and read
        `cross_tokens` of their images."""
        nbytes = tokens * self._self_token + cross_tokens * self._cross_token
        flops = self._decoder_flops(sequences, sequences * tokens, sequences * cross_tokens, sequences)
        return Work(flops, self._weights["decoder"] + sequences * nbytes)

    @property
    def _self_token(self) -> int:
        """Bytes of a token's keys and values, of all layers."""
        llm = self._config.llm
        return 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * self._size

    @property
    def _cross_token(self) -> int:
        llm = self._config.llm
        return 2 * len(self._config.cross_layers) * llm.num_kv_heads * llm.head_dim * self._size

    def _encode(self, tiles: int) -> Work:
        vision, multiplied = self._config.vision, self._multiplied
        patches, tokens = vision.grid**2, vision.grid**2 + 1
        linear = patches * multiplied["patches"] + tokens * multiplied["layers"]
        linear += self._config.tokens_per_tile * multiplied["projector"]
        attention = 2 * tokens**2 * vision.hidden_size * vision.num_layers
        return Work(2 * tiles * (linear + attention), self._weights["vision_encoder"])

    def _decoder_flops(self, tokens: int, pairs: int, cross_pairs: int, rows: int) -> float:
        """`pairs` of a token and one that it attends to, by self- and by cross-attention; `rows` of logits."""
        llm = self._config.llm
        attention = pairs * llm.num_layers + cross_pairs * len(self._config.cross_layers)
        linear = tokens * self._multiplied["decoder"] + rows * llm.vocab_size * llm.hidden_size
        return 2 * (linear + 2 * attention * llm.num_heads * llm.head_dim)


def _rows_of(name: str) -> str:
    """What a linear layer is run for each row of."""
    if ".patch_embedding." in name:
        return "patches"
    component, stage = _component(name), _stage(name)
    return {"vision_encoder": "layers", "projector": "projector"}.get(component, stage)
