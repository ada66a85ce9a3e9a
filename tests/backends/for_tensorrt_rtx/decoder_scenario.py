"""Random rows of a tiny decoder and the calls that a server makes of it, with the results of the PyTorch oracle.

In shapes: B rows, S new tokens, L = max_seq_len, N = tokens of a cross-attention cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from layer_reading import Array
from stages import IMAGE_TOKEN

from nvlm_trt.limits import EngineLimits
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.reference.model import ReferenceModel

LIMITS = EngineLimits(max_slots=4, max_seq_len=48, max_image_tokens=40)
CAPACITY = cache_length(LIMITS.max_image_tokens)
# Image tokens in the rows' cross-attention caches: an odd number, the whole cache, none.
CROSS_TOKENS = (33, CAPACITY, 0)
ROWS = len(CROSS_TOKENS)

Run = Callable[[dict[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True)
class Call:
    """New tokens of some rows, which stand at `starts`; `logit_index` chooses the tokens whose logits are wanted."""

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    tokens: int
    logit_index: tuple[int, ...]


CALLS = {
    "a prompt's first chunk": Call((1,), (0,), 20, (19,)),
    "its second chunk, through an image": Call((1,), (20,), 7, (6,)),
    "a prompt without image": Call((2,), (0,), 40, (39,)),
    "a short prompt": Call((0,), (0,), 9, (8,)),
    "several tokens of rows of different lengths": Call((0, 1, 2), (9, 27, 40), 5, (4, 1, 3)),
    "one token of each row": Call((2, 0, 1), (45, 14, 32), 1, (0, 0, 0)),
    "the cache's last position": Call((0, 1, 2), (15, 33, 46), 2, (1, 1, 1)),
}


class Scenario:
    """Three rows of L tokens. What a row's caches do not hold is junk."""

    def __init__(self, model: ReferenceModel, seed: int = 0) -> None:
        config = model.config
        rng = np.random.default_rng(seed)
        self.config = config
        length = LIMITS.max_seq_len
        self.input_ids = rng.integers(0, 256, (ROWS, length))
        self.images = rng.standard_normal((ROWS, length, config.llm.hidden_size), dtype=np.float32)
        cross = [torch.from_numpy(rng.standard_normal((n, config.llm.hidden_size), np.float32)) for n in CROSS_TOKENS]
        if config.architecture == "D":
            self.input_ids[1, 3:11] = self.input_ids[1, 17:24] = IMAGE_TOKEN
            self.input_ids[0, 10:13] = self.input_ids[2, 42:44] = IMAGE_TOKEN  # of several rows in one call
        self.ranges = np.stack([_ranges(n, length) for n in CROSS_TOKENS])  # [B, L, 2]
        self.cross = _junk(rng, self._cross_shapes())
        self.unused = _junk(rng, self._cache_shapes())
        self.logits = np.empty((ROWS, length, config.llm.vocab_size), np.float32)
        self.cache = {name: values.copy() for name, values in self.unused.items()}  # of whole rows
        for row in range(ROWS):
            self._ask_oracle(model, row, cross[row])

    def _ask_oracle(self, model: ReferenceModel, row: int, cross: torch.Tensor) -> None:
        ids, key_values = torch.from_numpy(self.input_ids[row : row + 1]), None
        images = torch.from_numpy(self.images[row])[ids[0] == IMAGE_TOKEN]
        if self.config.cross_layers:
            key_values = model.language_model.cross_kv(cross)
            for j, pair in enumerate(key_values):
                for kind, tensor in zip(("key", "value"), pair, strict=True):
                    self.cross[f"cross_{kind}.{j}"][row, :, : len(cross)] = tensor.numpy()
        ranges = torch.from_numpy(self.ranges[row : row + 1])
        logits, cache = model(ids, images if len(images) else None, key_values, ranges)
        self.logits[row] = logits[0].numpy()
        for i, pair in enumerate(cache):
            for kind, tensor in zip(("key", "value"), pair, strict=True):
                self.cache[f"{kind}.{i}"][row] = tensor[0].numpy()

    def _cross_shapes(self) -> dict[str, tuple[int, ...]]:
        llm = self.config.llm
        shape = (ROWS, llm.num_kv_heads, CAPACITY, llm.head_dim)
        blocks = range(len(self.config.cross_layers))
        return {f"cross_{kind}.{j}": shape for j in blocks for kind in ("key", "value")}

    def _cache_shapes(self) -> dict[str, tuple[int, ...]]:
        llm = self.config.llm
        shape = (ROWS, llm.num_kv_heads, LIMITS.max_seq_len, llm.head_dim)
        return {f"{kind}.{i}": shape for i in range(llm.num_layers) for kind in ("key", "value")}

    def feeds(self, call: Call, cache: Mapping[str, Array], dtype: type = np.float32) -> dict[str, Array]:
        """Return the decoder's inputs. Without an image in the call, image_tokens is a row that nothing may read."""
        rows, places = _places(call)
        ids = self.input_ids[rows, places]  # [B, S]
        images = self.images[rows, places][ids == IMAGE_TOKEN]  # [M, hidden]
        unread = np.full((1, images.shape[-1]), np.nan, np.float32)
        feeds = {
            "input_ids": ids,
            "image_tokens": (images if len(images) else unread).astype(dtype),
            "write_indices": np.array(call.starts),
            "logit_index": np.array(call.logit_index),
            **{f"past_{name}": values[list(call.rows)].astype(dtype) for name, values in cache.items()},
        }
        if self.config.cross_layers:
            feeds["cross_ranges"] = self.ranges[rows, places]
            feeds |= {name: values[list(call.rows)].astype(dtype) for name, values in self.cross.items()}
        return feeds

    def play(self, run: Run, calls: Mapping[str, Call] = CALLS, dtype: type = np.float32) -> Played:
        """Make calls with one set of caches, as a server does. `dtype` of the graph's floating-point inputs.

        Raise AssertionError if a call changes what it does not write."""
        cache: dict[str, Array] = {name: values.astype(dtype) for name, values in self.unused.items()}
        logits = {}
        for name, call in calls.items():
            outputs = run(self.feeds(call, cache, dtype))
            logits[name] = np.asarray(outputs["logits"], np.float32)
            for key, values in cache.items():
                present = outputs[f"present_{key}"]
                kept = ~_written({name: call})[list(call.rows)]  # [B, L]
                before, after = (array.swapaxes(1, 2)[kept] for array in (values[list(call.rows)], present))
                assert before.tobytes() == after.tobytes(), f"{name} changed places of {key} that are not new"
                values[list(call.rows)] = present
        return Played(logits, _in_use(cache, calls))

    def expected(self, calls: Mapping[str, Call] = CALLS) -> Played:
        """Return the oracle's results of all calls."""
        logits = {}
        for name, call in calls.items():
            last = np.add(call.starts, call.logit_index)
            logits[name] = self.logits[list(call.rows), last]
        return Played(logits, _in_use(self.cache, calls))


@dataclass(frozen=True)
class Played:
    """The results of all calls."""

    logits: dict[str, Array]  # of each call [B, vocab]
    cache: dict[str, Array]  # what all calls wrote [tokens, kv_heads, D]

    def difference(self, other: Played) -> float:
        """Return the largest difference of a logit or a number in a cache; NaN if one is not a number."""
        return max(self.logits_difference(other), max_difference(self.cache, other.cache), key=_seen)

    def logits_difference(self, other: Played) -> float:
        return max_difference(self.logits, other.logits)


def max_difference(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """Return the largest difference between arrays of one name; NaN if one is not a number."""
    assert a.keys() == b.keys()
    assert all(a[name].shape == b[name].shape for name in a)
    return float(np.max([np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max() for name in a]))


def _seen(difference: float) -> float:
    return np.inf if np.isnan(difference) else difference


def _written(calls: Mapping[str, Call]) -> Array:
    """Return the places that calls write: [rows, L]."""
    written = np.zeros((ROWS, LIMITS.max_seq_len), bool)
    for call in calls.values():
        written[_places(call)] = True
    return written


def _in_use(cache: Mapping[str, Array], calls: Mapping[str, Call]) -> dict[str, Array]:
    """Return what calls wrote of caches [rows, kv_heads, L, D]: [tokens, kv_heads, D] each."""
    written = _written(calls)
    return {name: values.swapaxes(1, 2)[written].astype(np.float32) for name, values in cache.items()}


def _places(call: Call) -> tuple[Array, Array]:
    """Return rows [B, 1] and positions [B, S]."""
    return np.array(call.rows)[:, None], np.array(call.starts)[:, None] + np.arange(call.tokens)


def _ranges(cross_tokens: int, length: int) -> Array:
    """Make ranges [L, 2] of all kinds: empty, a tag's, with odd borders, of one token, all; without tokens, empty."""
    kinds = [(0, 0), (16, 32), (7, 29), (0, cross_tokens), (20, 20), (cross_tokens - 1, cross_tokens)]
    chosen = [kinds[place // 2 % len(kinds)] if cross_tokens else (0, 0) for place in range(length)]
    return np.array(chosen, np.int32)


def _junk(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    return {name: 1e3 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
