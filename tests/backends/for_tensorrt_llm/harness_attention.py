"""Stands in for the attention plugin: the network that trtllm-build would build, with in-flight batching, on a CPU.

`mark_attention` makes TensorRT-LLM's layers call a double of `gpt_attention`, which checks the arguments and leaves
markers in the network. `AttentionPlayer` computes what the plugin's kernels do at these markers: rotation, causal
attention over cached keys, and cross-attention as the C++ sources of 1.3.0rc3 read. In prefill a token reads the
columns of its mask row up to its request's length; in generation the last of these columns stands for all.

In shapes: T tokens of the batch, H query heads, KV key heads, D channels of a head, C cross-attended tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from layer_reading import Array

_QKV, _CROSS, _CONTEXT = "ATTENTION_QKV.", "ATTENTION_CROSS.", "ATTENTION_CONTEXT."
# The inputs that the plugin cannot do without, which the real function would only miss inside C++.
_ALWAYS = (
    *("qkv", "sequence_length", "host_past_key_value_lengths", "host_max_attention_window_sizes"),
    *("host_sink_token_length", "context_lengths", "cache_indirection", "host_request_types", "host_context_lengths"),
    *("kv_cache_block_offsets", "host_kv_cache_block_offsets", "host_kv_cache_pool_pointers"),
    *("host_kv_cache_pool_mapping", "host_runtime_perf_knobs", "host_context_progress"),
)
_CROSS_INPUTS = (
    *("cross_kv", "cross_kv_length", "encoder_input_lengths", "attention_mask", "attention_packed_mask", "skip_attn"),
)


@dataclass(frozen=True)
class AttentionLayer:
    """One call of `gpt_attention`."""

    layer: int  # its number in the caches of the rank
    is_cross: bool
    heads: int
    key_heads: int
    head_dim: int
    rotary_base: float
    inputs: Mapping[str, str]  # names of its arguments -> names of the network's tensors


def mark_attention() -> list[AttentionLayer]:
    """Replace the plugin for networks that are built from now on. Return the list that its calls fill."""
    import tensorrt_llm._utils
    from tensorrt_llm import functional
    from tensorrt_llm.layers import attention

    signature = inspect.signature(functional.gpt_attention)
    found: list[AttentionLayer] = []

    def gpt_attention(**arguments: Any) -> tuple[Any, None]:
        given = signature.bind(**arguments).arguments
        is_cross = given["do_cross_attention"]
        missing = [name for name in (*_ALWAYS, *(_CROSS_INPUTS if is_cross else ())) if given.get(name) is None]
        assert not missing, f"layer {given['layer_idx']} lacks {missing}"
        assert is_cross or given.get("attention_mask") is None
        assert given["use_cache"]
        names = {name: value.trt_tensor.name for name, value in given.items() if isinstance(value, functional.Tensor)}
        number = len(found)
        found.append(
            AttentionLayer(
                given["layer_idx"],
                is_cross,
                given["num_heads"],
                given["num_kv_heads"],
                given["hidden_size_per_head"],
                given["rotary_embedding_base"],
                names,
            )
        )
        qkv = _named(given["qkv"], f"{_QKV}{number}")
        rows, width = functional.shape(qkv, 0), given["num_heads"] * given["hidden_size_per_head"]
        context = functional.slice(qkv, [0, 0], functional.concat([rows, width]))
        if is_cross:  # so that the keys come before what needs them
            keys = _named(given["cross_kv"], f"{_CROSS}{number}")
            context = context + functional.sum(functional.sum(keys, dim=0, keepdim=True), dim=1, keepdim=True)
        return _named(context, f"{_CONTEXT}{number}"), None

    attention.gpt_attention = gpt_attention
    tensorrt_llm._utils.get_sm_version = lambda: 90  # an H100
    return found


def _named(tensor: Any, name: str) -> Any:
    from tensorrt_llm import functional

    layer = functional.default_trtnet().add_identity(tensor.trt_tensor)
    marked = functional._create_tensor(layer.get_output(0), layer)
    marked.trt_tensor.name = name
    return marked


@dataclass
class Sequence:
    """A request in flight: how many tokens are done, how many come now, and its caches by layer."""

    cross_tokens: int
    done: int = 0
    now: int = 0
    is_prefill: bool = True
    keys: dict[int, Array] = field(default_factory=dict)  # layer -> [KV, tokens so far, D], rotated
    values: dict[int, Array] = field(default_factory=dict)
    cross: dict[int, Array] = field(default_factory=dict)  # layer -> [C, 2, KV, D]


class AttentionPlayer:
    """Computes attention for one step of a batch: requests in prefill stand before those in generation."""

    def __init__(self, layers: list[AttentionLayer], sequences: list[Sequence], feeds: Mapping[str, Array]) -> None:
        self._layers, self._sequences, self._feeds = layers, sequences, feeds
        self._qkv: dict[int, Array] = {}
        self._cross: dict[int, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        """Return what follows a layer of the network: its value, or the context [T, H * D] of an attention."""
        kind, _, number = name.rpartition(".")
        if f"{kind}." == _QKV:
            self._qkv[int(number)] = value
        elif f"{kind}." == _CROSS:
            self._cross[int(number)] = value
        elif f"{kind}." == _CONTEXT:
            layer = self._layers[int(number)]
            compute = self._cross_attention if layer.is_cross else self._self_attention
            return compute(layer, int(number)).reshape(value.shape).astype(value.dtype)
        return value

    def _self_attention(self, layer: AttentionLayer, number: int) -> Array:
        split = np.cumsum([layer.heads, layer.key_heads])
        query, key, value = np.split(_by_head(self._qkv[number], layer), split, axis=0)  # [heads, T, D]
        contexts, start = [], 0
        for sequence in self._sequences:
            rows = slice(start, start := start + sequence.now)
            places = np.arange(sequence.done, sequence.done + sequence.now)
            empty = np.zeros((layer.key_heads, 0, layer.head_dim), np.float32)
            keys = [sequence.keys.get(layer.layer, empty), _rotated(key[:, rows], places, layer.rotary_base)]
            values = [sequence.values.get(layer.layer, empty), value[:, rows]]
            assert keys[0].shape[1] == sequence.done, "tokens of the cache and of the step do not meet"
            sequence.keys[layer.layer], sequence.values[layer.layer] = (
                np.concatenate(keys, 1),
                np.concatenate(values, 1),
            )
            reads = np.arange(sequence.done + sequence.now) <= places[:, None]
            contexts.append(
                _attention(
                    _rotated(query[:, rows], places, layer.rotary_base),
                    sequence.keys[layer.layer],
                    sequence.values[layer.layer],
                    reads,
                )
            )
        return np.concatenate(contexts)

    def _cross_attention(self, layer: AttentionLayer, number: int) -> Array:
        query = _by_head(self._qkv[number], layer)[: layer.heads]
        mask = self._feeds[layer.inputs["attention_mask"]]  # [T, C of the longest]
        lengths = self._feeds[layer.inputs["encoder_input_lengths"]]
        keys = self._cross[number].reshape(-1, 2, layer.key_heads, layer.head_dim)
        contexts, start, first = [], 0, 0
        for sequence, length in zip(self._sequences, lengths.tolist(), strict=True):
            assert length == sequence.cross_tokens
            rows = slice(start, start := start + sequence.now)
            if sequence.is_prefill:
                sequence.cross[layer.layer] = keys[first : (first := first + length)]
                reads = mask[rows, :length]
            else:
                reads = np.repeat(mask[rows, length - 1 : length], length, axis=1)
            own_keys, own_values = sequence.cross[layer.layer].transpose(1, 2, 0, 3)
            contexts.append(_attention(query[:, rows], own_keys, own_values, reads))
        assert first == len(keys)
        return np.concatenate(contexts)


def _by_head(x: Array, layer: AttentionLayer) -> Array:
    """[T, heads * D] -> [heads, T, D]."""
    return x.reshape(len(x), -1, layer.head_dim).swapaxes(0, 1)


def _rotated(x: Array, places: Array, base: float) -> Array:
    """Rotate x [heads, T, D] to positions [T]; channels i and i + D / 2 are a pair."""
    half = x.shape[-1] // 2
    angles = places[:, None] / base ** (np.arange(half) / half)
    cosine, sine = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _attention(query: Array, key: Array, value: Array, reads: Array) -> Array:
    """query [H, T, D], key and value [KV, N, D], reads [T, N] -> [T, H * D]; a row without keys is NaN."""
    group = len(query) // len(key)
    key, value = np.repeat(key, group, axis=0), np.repeat(value, group, axis=0)
    scores = np.matmul(query, key.swapaxes(-1, -2)) / np.float32(np.sqrt(query.shape[-1]))
    scores = np.where(reads, scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        context = np.matmul(weights / weights.sum(-1, keepdims=True), value)  # [H, T, D]
    return context.swapaxes(0, 1).reshape(query.shape[1], -1)
