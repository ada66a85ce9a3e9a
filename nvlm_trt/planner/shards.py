"""Counts the tensors that one GPU stores of an LLM that TensorRT-LLM splits over tp x pp GPUs.

Names and shapes are those of TensorRT-LLM's checkpoint (docs/tensorrt_llm.md): linear layers are cut over the `tp`
ranks of a stage, norms, gates and the embedding table are on each of them, and layers are numbered from 0 in every
stage. The first stage has the embedding table, the last one the final norm and lm_head, padded to `tp` equal parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.parallel import stacked_layers
from nvlm_trt.model.precision import FLOAT_BYTES, WEIGHT_ONLY_BITS, floating_type

_BLOCK = 64  # weight-only kernels take features in multiples of 64 on every rank
_F32 = 4


def has_fp8_cache(config: NvlmConfig, precisions: Mapping[str, str]) -> bool:
    """Return whether keys and values are held in FP8: in fp8, but for NVLM-X and -H, whose cross-attention lacks the
    scale that prefill needs then."""
    return precisions["decoder"] == "fp8" and not config.cross_layers


@dataclass(frozen=True)
class Shard:
    """One tensor of one rank."""

    name: str
    elements: int
    nbytes: int  # scales included
    split: bool  # False: every rank of the stage has the same tensor
    quantised: bool = False
    read: bool = True  # False: a token looks up single rows


class StageShards:
    """Lists the tensors of a rank of one pipeline stage. All `tp` ranks of a stage have the same sizes."""

    def __init__(self, config: NvlmConfig, precisions: Mapping[str, str], tp: int, pp: int, stage: int) -> None:
        self._config, self._precisions, self._tp = config, precisions, tp
        self._size = FLOAT_BYTES[floating_type(precisions)]
        layers = stacked_layers(config)
        count = len(layers) // pp
        self.layers = layers[stage * count : (stage + 1) * count]
        self._first, self._last = stage == 0, stage == pp - 1

    def __iter__(self) -> Iterator[Shard]:
        llm = self._config.llm
        if self._first:
            yield self._whole("vocab_embedding.weight", llm.vocab_size * llm.hidden_size, read=False)
        for number, (kind, _) in enumerate(self.layers):
            yield from self._cross(f"layers.{number}") if kind == "cross" else self._decoder(f"layers.{number}")
        if self._last:
            yield self._whole("ln_f.weight", llm.hidden_size)
            rows = -(-llm.vocab_size // self._tp)
            yield Shard("lm_head.weight", rows * llm.hidden_size, rows * llm.hidden_size * self._size, split=True)

    @property
    def heads(self) -> int:
        return self._config.llm.num_heads // self._tp

    @property
    def kv_heads(self) -> int:
        """Count the key-value heads of a rank: with more ranks than heads, ranks share copies of one."""
        return -(-self._config.llm.num_kv_heads // self._tp)

    def _decoder(self, layer: str) -> Iterator[Shard]:
        llm, precision = self._config.llm, self._precisions["decoder"]
        yield self._whole(f"{layer}.input_layernorm.weight", llm.hidden_size)
        yield from self._attention(f"{layer}.attention", precision, llm.qkv_bias)
        yield self._whole(f"{layer}.post_layernorm.weight", llm.hidden_size)
        yield from self._mlp(f"{layer}.mlp", precision)

    def _cross(self, layer: str) -> Iterator[Shard]:
        """List a gated cross-attention block, whose attention is never quantised."""
        llm, cross = self._config.llm, self._config.cross_attention
        assert cross is not None
        yield self._whole(f"{layer}.input_layernorm.weight", llm.hidden_size)
        yield from self._attention(f"{layer}.cross_attention", floating_type(self._precisions), bias=False)
        if cross.qk_norm:
            yield self._whole(f"{layer}.cross_attention.q_layernorm.weight", llm.head_dim)
            yield self._whole(f"{layer}.cross_attention.k_layernorm.weight", llm.head_dim)
        yield self._whole(f"{layer}.gate_attn", 1)
        if cross.ffn:
            yield self._whole(f"{layer}.post_layernorm.weight", llm.hidden_size)
            yield self._whole(f"{layer}.gate_ffwd", 1)
            yield from self._mlp(f"{layer}.mlp", self._precisions["cross_attention"])

    def _attention(self, name: str, precision: str, bias: bool) -> Iterator[Shard]:
        llm = self._config.llm
        rows = (self.heads + 2 * self.kv_heads) * llm.head_dim
        yield self._linear(f"{name}.qkv.weight", rows, llm.hidden_size, precision)
        if bias:
            yield Shard(f"{name}.qkv.bias", rows, rows * self._size, split=True)
        yield self._linear(f"{name}.dense.weight", llm.hidden_size, self.heads * llm.head_dim, precision)
        if has_fp8_cache(self._config, self._precisions):
            yield Shard(f"{name}.kv_cache_scaling_factor", 1, _F32, split=False)

    def _mlp(self, name: str, precision: str) -> Iterator[Shard]:
        llm = self._config.llm
        width = llm.intermediate_size // self._tp
        for part in ("fc", "gate"):
            yield self._linear(f"{name}.{part}.weight", width, llm.hidden_size, precision)
        yield self._linear(f"{name}.proj.weight", llm.hidden_size, width, precision)

    def _linear(self, name: str, outputs: int, inputs: int, precision: str) -> Shard:
        """Count the weight [outputs, inputs] of a rank with the scales of its precision."""
        elements = outputs * inputs
        if precision in FLOAT_BYTES:
            return Shard(name, elements, elements * self._size, split=True)
        if precision in WEIGHT_ONLY_BITS:
            padded = _filled(outputs) * _filled(inputs)
            nbytes = padded * WEIGHT_ONLY_BITS[precision] // 8 + _filled(outputs) * self._size
        elif precision == "fp8":
            nbytes = elements + 2 * _F32  # a scale of the weight and one of its input
        else:  # int8: scales of the outputs, of the input, and a factor for each input
            nbytes = elements + outputs * _F32 + _F32 + inputs * self._size
        return Shard(name, elements, nbytes, split=True, quantised=True)

    def _whole(self, name: str, elements: int, read: bool = True) -> Shard:
        return Shard(name, elements, elements * self._size, split=False, read=read)


def _filled(features: int) -> int:
    return -(-features // _BLOCK) * _BLOCK
