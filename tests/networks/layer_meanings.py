"""The meanings of layers that a backend could get wrong without an error, as functions that a test can exchange.

In shapes: B sequences, S new tokens, N keys (the cache's length), H query heads, KV key heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from layer_reading import Array


def last_key(causal: str, lengths: Array, tokens: int, keys: int) -> Array:
    """Return the last key that each query may read: lengths [B], S tokens, N keys -> [B, S]."""
    if causal == "LOWER_RIGHT":  # the last query reads all keys in use
        return lengths[:, None] - tokens + np.arange(tokens)
    return upper_left_or_none(causal, lengths, tokens, keys)


def upper_left_or_none(causal: str, lengths: Array, tokens: int, keys: int) -> Array:
    """Return the last keys of UPPER_LEFT, where query s reads key s and those before, or NONE: [B, S]."""
    assert causal in ("UPPER_LEFT", "NONE"), f"unknown causal mask {causal}"
    rows = np.arange(tokens) if causal == "UPPER_LEFT" else np.full(tokens, keys - 1)
    return np.broadcast_to(rows, (len(lengths), tokens))


def keys_in_use(lengths: Array | None, batch: int, keys: int) -> Array:
    """Return how many keys each sequence has: [B]."""
    return np.full(batch, keys) if lengths is None else lengths


def key_head(heads: int, key_heads: int) -> Array:
    """Return the key head that each query head reads: [H]."""
    return np.arange(heads) // (heads // key_heads)


def rotary_pairs(size: int, interleaved: bool) -> tuple[Array, Array]:
    """Return the channels that are rotated together: first [size / 2], second [size / 2]."""
    if interleaved:
        return np.arange(0, size, 2), np.arange(1, size, 2)
    return np.arange(size // 2), np.arange(size // 2, size)


def truncated_quotient(a: Array, b: Array) -> Array:
    """Divide integers as C does, towards zero."""
    assert (b != 0).all()
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


def gelu_erf(x: Array) -> Array:
    erf = torch.erf(torch.from_numpy(x.astype(np.float64)) / math.sqrt(2)).numpy()
    return (x * 0.5 * (1 + erf)).astype(x.dtype)


@dataclass(frozen=True)
class Meaning:
    """One reading of a network. The defaults are the product's; a negative control replaces one of them."""

    last_key: Callable[[str, Array, int, int], Array] = last_key
    keys_in_use: Callable[[Array | None, int, int], Array] = keys_in_use
    key_head: Callable[[int, int], Array] = key_head
    visible: Callable[[Array], Array] = lambda mask: mask  # True in a mask: the query reads the key
    score_scale: Callable[[int], float] = lambda head_dim: 1.0  # the graph scales queries itself
    rotary_pairs: Callable[[int, bool], tuple[Array, Array]] = rotary_pairs
    rotary_sine: Callable[[Array], Array] = lambda sine: sine
    first_written: Callable[[int], int] = lambda write_index: write_index
    integer_quotient: Callable[[Array, Array], Array] = truncated_quotient
    gelu_erf: Callable[[Array], Array] = gelu_erf
    cumulative_sum: Callable[[Array, int], Array] = lambda x, axis: np.cumsum(x, axis=axis, dtype=x.dtype)
    rounded: Callable[[Array], Array] = np.rint  # of a quotient, to int8
    dequantised: Callable[[Array, Array], Array] = np.multiply  # values and scales of one rank, float32


HONEST = Meaning()
