"""Says which rows and columns of our checkpoint's tensors the ranks of a stage hold, and under which names.

A stage's tensors have the same names on all of its ranks, so each tensor of the checkpoint is read once for all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nvlm_trt.builders.tensorrt_llm.layout import ffn_width, padded_vocabulary
from nvlm_trt.builders.tensorrt_llm.mapping import Layer, Mapping, kv_heads_per_rank
from nvlm_trt.builders.tensorrt_llm.quantization import STATIC, LlmQuantization
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING, LM_HEAD


@dataclass(frozen=True)
class Piece:
    """Places rows and columns of a source in a rank's tensor. Row rows[0] of the source becomes row `first`."""

    rows: range
    columns: range | None = None  # None: all, in order
    first: int = 0


@dataclass(frozen=True)
class Part:
    """Names a tensor of our checkpoint, and the piece of each rank of the stage, by tp_rank."""

    source: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FloatTensor:
    """Is written in the checkpoint's floating-point type."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Scale:
    """Is one float32 number, [1], the same on every rank."""

    name: str
    value: float


@dataclass(frozen=True)
class QuantisedLinear:
    """Is written as `name`.weight and its scales. Parts: weights stacked by rows, or one weight cut in columns."""

    name: str
    parts: tuple[Part, ...]
    inputs: tuple[str, ...]  # the layers of the calibration whose input this layer has
    one_scale: tuple[str, ...]  # the weights of our checkpoint that share one scale where a scale covers a whole tensor


StageTensor = FloatTensor | Scale | QuantisedLinear


def stage_tensors(
    config: NvlmConfig, mapping: Mapping, quantization: LlmQuantization, stage: int
) -> Iterator[StageTensor]:
    """Yield the tensors of a stage in the order in which a model reads them."""
    shards = _Shards(config, mapping, quantization)
    llm = config.llm
    if stage == 0:
        yield FloatTensor("transformer.vocab_embedding.weight", (shards.whole(EMBEDDING, llm.vocab_size),))
    for i, layer in enumerate(mapping.layers(config, stage)):
        yield from shards.layer(f"transformer.layers.{i}", layer)
    if stage == mapping.pp - 1:
        yield FloatTensor("transformer.ln_f.weight", (shards.whole("language_model.model.norm.weight"),))
        head = EMBEDDING if llm.tie_word_embeddings else LM_HEAD
        rows = padded_vocabulary(config, mapping) // mapping.tp
        yield FloatTensor("lm_head.weight", (Part(head, shards.by_rows(llm.vocab_size, rows)),))


class _Shards:
    """Makes the tensors of one layer after the other."""

    def __init__(self, config: NvlmConfig, mapping: Mapping, quantization: LlmQuantization) -> None:
        self._config, self._quantization, self._tp = config, quantization, mapping.tp
        self._ffn = ffn_width(config, mapping, quantization) // mapping.tp

    def layer(self, name: str, layer: Layer) -> Iterator[StageTensor]:
        llm, source = self._config.llm, layer.source
        attention = f"{name}.{'cross_attention' if layer.is_cross else 'attention'}"
        theirs = f"{source}.{'attn' if layer.is_cross else 'self_attn'}"
        cross = self._config.cross_attention if layer.is_cross else None

        yield self._vector(f"{name}.input_layernorm.weight", f"{source}.input_layernorm.weight", llm.hidden_size)
        yield self._linear(f"{attention}.qkv", self._qkv(theirs, "weight"), (f"{theirs}.qkv_proj",))
        if llm.qkv_bias and not layer.is_cross:
            yield FloatTensor(f"{attention}.qkv.bias", self._qkv(theirs, "bias"))
        yield self._linear(
            f"{attention}.dense",
            (self._columns(f"{theirs}.o_proj", llm.hidden_size, llm.num_heads // self._tp * llm.head_dim),),
            (f"{theirs}.o_proj",),
        )
        if cross is not None:
            if cross.qk_norm:
                yield self._vector(f"{attention}.q_layernorm.weight", f"{theirs}.q_norm.weight", llm.head_dim)
                yield self._vector(f"{attention}.k_layernorm.weight", f"{theirs}.k_norm.weight", llm.head_dim)
            yield self._vector(f"{name}.gate_attn", f"{source}.attn_gate", 1)
        if self._quantization.kv_cache is not None:
            yield Scale(f"{attention}.kv_cache_scaling_factor", 1.0)
        if cross is None or cross.ffn:
            norm = f"{source}.post_attention_layernorm.weight"
            yield self._vector(f"{name}.post_layernorm.weight", norm, llm.hidden_size)
            yield from self._swiglu(f"{name}.mlp", f"{source}.mlp")
        if cross is not None and cross.ffn:
            yield self._vector(f"{name}.gate_ffwd", f"{source}.mlp_gate", 1)

    def whole(self, source: str, rows: int | None = None) -> Part:
        """Give every rank the whole tensor."""
        count = self._config.llm.hidden_size if rows is None else rows
        return Part(source, tuple(Piece(range(count)) for _ in range(self._tp)))

    def by_rows(self, count: int, width: int, first: int = 0) -> tuple[Piece, ...]:
        """Give each rank the next `width` rows; the last ranks' rows beyond `count` stay zero."""
        return tuple(Piece(range(t * width, min((t + 1) * width, count)), first=first) for t in range(self._tp))

    def _swiglu(self, name: str, source: str) -> Iterator[StageTensor]:
        """TensorRT-LLM's fc is our gate_proj, its gate our up_proj: silu(fc(x)) * gate(x)."""
        llm = self._config.llm
        observed = (f"{source}.gate_proj", f"{source}.up_proj")
        pieces = self.by_rows(llm.intermediate_size, self._ffn)
        for ours, theirs in (("fc", "gate_proj"), ("gate", "up_proj")):
            # the runtime may compute fc and gate as one product, so that they share their scales
            yield self._linear(
                f"{name}.{ours}",
                (Part(f"{source}.{theirs}.weight", pieces),),
                observed,
                tuple(f"{linear}.weight" for linear in observed),
            )
        down = self._columns(f"{source}.down_proj", llm.hidden_size, self._ffn, llm.intermediate_size)
        yield self._linear(f"{name}.proj", (down,), (f"{source}.down_proj",))

    def _qkv(self, source: str, kind: str) -> tuple[Part, ...]:
        """Stack a rank's rows of q, k and v. Query head h reads key/value head h * kv_heads // heads on every rank."""
        llm, tp = self._config.llm, self._tp
        query = llm.num_heads // tp * llm.head_dim
        heads = kv_heads_per_rank(llm, tp)
        parts = [Part(f"{source}.q_proj.{kind}", self.by_rows(llm.num_heads * llm.head_dim, query))]
        first = query
        for part in "kv":
            starts = [t * llm.num_kv_heads // tp * llm.head_dim for t in range(tp)]
            pieces = tuple(Piece(range(start, start + heads * llm.head_dim), first=first) for start in starts)
            parts.append(Part(f"{source}.{part}_proj.{kind}", pieces))
            first += heads * llm.head_dim
        return tuple(parts)

    def _columns(self, source: str, rows: int, width: int, count: int | None = None) -> Part:
        """Give each rank the next `width` columns of a weight; the last ranks' columns beyond `count` stay zero."""
        end = width * self._tp if count is None else count
        columns = [range(t * width, min((t + 1) * width, end)) for t in range(self._tp)]
        return Part(f"{source}.weight", tuple(Piece(range(rows), part) for part in columns))

    def _vector(self, name: str, source: str, size: int) -> FloatTensor:
        return FloatTensor(name, (self.whole(source, size),))

    def _linear(
        self, name: str, parts: tuple[Part, ...], inputs: tuple[str, ...], one_scale: tuple[str, ...] = ()
    ) -> StageTensor:
        """Make a linear layer. `one_scale`: weights that share a scale, if these are more than those of `parts`."""
        quantization = self._quantization
        if quantization.algo not in STATIC or not quantization.covers(name, self._config):
            return FloatTensor(f"{name}.weight", parts)
        return QuantisedLinear(name, parts, inputs, one_scale or tuple(part.source for part in parts))
