"""Runs in NumPy the layers of TensorRT-RTX that make a decoder: attention, caches, rotations and quantisation.

In shapes: B sequences, S new tokens, N keys (the cache's length), H query heads, KV key heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from layer_meanings import Meaning
from layer_reading import NUMPY, Array


def attention(api: Any, inputs: list[Any], meaning: Meaning) -> Array:
    """query [B, H, S, D], key and value [B, KV, N, D], mask [B or 1, H or 1, S, N] bool, lengths [B] int32
    -> [B, H, S, D].

    A query that reads no key becomes NaN, so that a test fails if the network uses it."""
    given: list[Any] = [*inputs, *[None] * (7 - len(inputs))]
    query, key, value, mask, scale, query_lengths, lengths = given
    attending = api.attention
    forms = {attending.query_form.name, attending.key_value_form.name}
    assert attending.norm_op.name == "SOFTMAX"
    assert forms == {"PADDED_BHND"}, forms
    assert scale is None
    assert query_lengths is None
    assert (mask is None) == (attending.mask is None)
    assert (lengths is None) == (attending.key_value_lengths is None)
    assert query.dtype == key.dtype == value.dtype
    (batch, heads, tokens, channels), (_, key_heads, keys, _) = query.shape, key.shape
    assert key.shape == value.shape == (batch, key_heads, keys, channels)
    assert heads % key_heads == 0
    assert keys > 0, "attention over no keys is undefined"

    in_use = meaning.keys_in_use(lengths, batch, keys)
    assert lengths is None or (lengths.shape == (batch,) and (lengths > 0).all() and (lengths <= keys).all())
    causal = attending.causal_kind.name
    assert causal == "NONE" or mask is None, "a causal layer has no mask"
    places = np.arange(keys)
    reads = places < in_use[:, None, None]  # [B, 1, N]
    reads = reads & (places <= meaning.last_key(causal, in_use, tokens, keys)[:, :, None])  # [B, S, N]
    reads = reads[:, None]  # [B, 1, S, N]
    if mask is not None:
        assert mask.dtype == np.bool_, f"a mask of {mask.dtype} is unknown"
        assert mask.ndim == 4
        reads = reads & meaning.visible(mask)

    chosen = meaning.key_head(heads, key_heads)  # [H]
    scores = np.matmul(_float(query), _float(key)[:, chosen].swapaxes(-1, -2))  # [B, H, S, N]
    scores = np.where(reads, scores * np.float32(meaning.score_scale(channels)), -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(query.dtype)
    return np.matmul(_float(weights), _float(value)[:, chosen]).astype(query.dtype)


def cache_update(api: Any, inputs: list[Any], meaning: Meaning) -> Array:
    """cache [B, KV, N, D], update [B, KV, S, D], write_indices [B] int32 -> the new cache."""
    cache, update, write_indices = inputs
    assert api.cache_mode.name == "LINEAR"
    assert api.update_form.name == "PADDED_BHND"
    assert api.update_lengths is None
    assert cache.dtype == update.dtype
    assert write_indices.dtype == np.int32
    assert write_indices.shape == (len(cache),)
    tokens = update.shape[2]
    assert update.shape == (*cache.shape[:2], tokens, cache.shape[3])
    updated = cache.copy()
    for row, write_index in enumerate(write_indices.tolist()):
        first = meaning.first_written(write_index)
        assert 0 <= first <= cache.shape[2] - tokens, f"{tokens} tokens at {first} leave a cache of {cache.shape[2]}"
        updated[row, :, first : first + tokens] = update[row]
    return updated


def rotary_embedding(api: Any, inputs: list[Any], meaning: Meaning) -> Array:
    """x [B, H, S, D], cos and sin [positions, D / 2], positions [B, S] -> [B, H, S, D]."""
    x, cosine, sine, positions = inputs
    assert x.dtype == cosine.dtype == sine.dtype
    assert positions.dtype == np.int64
    assert positions.shape == (x.shape[0], x.shape[2])
    assert positions.min() >= 0
    assert positions.max() < len(cosine)
    size = x.shape[-1]
    assert api.rotary_embedding_dim in (0, size), "a rotation of some channels is unknown"  # 0: of all
    assert cosine.shape == sine.shape == (len(cosine), size // 2)
    first, second = meaning.rotary_pairs(size, api.interleaved)
    cosine, sine = cosine[positions][:, None], meaning.rotary_sine(sine[positions][:, None])  # [B, 1, S, D / 2]
    rotated = np.empty_like(x)
    rotated[..., first] = x[..., first] * cosine - x[..., second] * sine
    rotated[..., second] = x[..., first] * sine + x[..., second] * cosine
    return rotated


def quantize(api: Any, inputs: list[Any], meaning: Meaning) -> Array:
    x, scale = inputs[0], inputs[1]
    assert scale.dtype == x.dtype
    quotient = _float(x) / _spread(api, scale, x, inputs[2:])
    kind = api.to_type.name
    if kind == "INT8":
        return np.clip(meaning.rounded(quotient), -128, 127).astype(np.int8)
    assert kind == "FP8", f"quantising to {kind} is unknown"
    return np.clip(quotient, -448, 448).astype(NUMPY[kind])


def dequantize(api: Any, inputs: list[Any], meaning: Meaning) -> Array:
    values, scale = inputs[0], inputs[1]
    to = NUMPY[api.to_type.name]
    assert scale.dtype == to
    return meaning.dequantised(_float(values), _spread(api, scale, values, inputs[2:])).astype(to)


def _spread(api: Any, scale: Array, values: Array, zero_points: list[Any]) -> Array:
    """Return the scales in float32 and in a shape that multiplies the values: one, one per channel or per block."""
    assert all(zero is None or not zero.any() for zero in zero_points), "a zero point is unknown"
    assert (scale > 0).all(), "TensorRT refuses a scale that is not positive"
    scale = _float(scale)
    blocks = _block_shape(api)
    if scale.ndim == 0:
        assert blocks is None
        return scale
    if scale.ndim == 1:
        assert blocks is None
        assert scale.shape == (values.shape[api.axis],)
        return scale.reshape([-1 if axis == api.axis else 1 for axis in range(values.ndim)])
    assert scale.ndim == values.ndim
    for axis, (count, size) in enumerate(zip(scale.shape, values.shape, strict=True)):
        assert size % count == 0
        assert blocks is None or blocks[axis] in (-1, size // count), (blocks, scale.shape, values.shape)
        scale = np.repeat(scale, size // count, axis=axis)
    return scale


def _block_shape(api: Any) -> tuple[int, ...] | None:
    try:
        return tuple(api.block_shape)
    except RuntimeError:  # the bindings raise where none is set
        return None


def _float(x: Array) -> Array:
    return x.astype(np.float32)
