"""Runs an engine with ONNX Runtime on the CPU: one session per stage, caches in NumPy arrays, updated in place.

A slot is a row of every cache. A pointer to cache[lo:hi] is bound as input and as output of the decoder, so the decoder
writes new keys and values into the cache itself: [slot:slot + 1] to prefill one slot, [0:n] to decode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import (
    STAGES,
    BackendArray,
    FloatArray,
    ImageFeatures,
    IntArray,
    RangeArray,
    embedding_rows,
    host_array,
)
from nvlm_trt.backends.onnxruntime import ENCODE_TILES
from nvlm_trt.backends.onnxruntime.session import (
    RUNTIME_ERRORS,
    InferenceSession,
    IOBinding,
    bind_input,
    bind_output,
    first_line,
    open_session,
    session_options,
)
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits, check_embeddings
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.prompt.image_tokens import check_cross_tiles, split_tiles

if TYPE_CHECKING:
    from nvlm_trt.backends.openvino.encoder import OpenVinoEncoder


class OnnxRuntimeBackend(ClosedOnExit):
    """Implements `StepBackend`. Image tokens and features are NumPy arrays."""

    def __init__(
        self, engine: Engine, stages: Collection[str], threads: int | None, encoder: OpenVinoEncoder | None = None
    ) -> None:
        """Load stages of an engine. `encoder` runs the vision encoder, which is then not among the `stages`."""
        self.config: NvlmConfig = engine.config
        self.limits: EngineLimits = engine.limits
        self._path = engine.path
        self._sessions = {
            stage: open_session(engine.path / f"{stage}.onnx", session_options(threads))
            for stage in STAGES
            if stage in stages
        }
        self._encoder = encoder
        self._cache = _allocate(self.config, self.limits) if "decoder" in self._sessions else {}
        self._several_logits = "decoder" in self._sessions and _takes_several(self._sessions["decoder"])
        self._logits = np.empty((self.limits.max_slots, self.config.llm.vocab_size), np.float32)
        self._no_embeddings = np.empty((0, self.config.llm.hidden_size), np.float32)
        self._bindings: dict[tuple[int, int], IOBinding] = {}  # by first slot and last slot + 1

    # --- images ------------------------------------------------------------------------------------------------------

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """Encode pixel_values [tiles, 3, E, E] into image tokens [tiles, T, hidden]."""
        if self._encoder:
            return self._encoder.encode(pixel_values)
        pixel_values = np.ascontiguousarray(pixel_values, np.float32)
        image_tokens = np.empty(
            (len(pixel_values), self.config.tokens_per_tile, self.config.llm.hidden_size), np.float32
        )
        for start in range(0, len(pixel_values), ENCODE_TILES):
            tiles = slice(start, start + ENCODE_TILES)
            binding = self._session("vision_encoder").io_binding()
            bind_input(binding, "pixel_values", pixel_values[tiles])
            bind_output(binding, "image_tokens", image_tokens[tiles])
            self._run("vision_encoder", binding)
        return image_tokens

    def import_tokens(self, tokens: Any) -> FloatArray:
        """Copy image tokens [tiles, T, hidden] from outside."""
        return host_array(tokens).copy()

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        """Compute the features of one image from its image tokens [tiles, T, hidden]."""
        tokens = host_array(image_tokens)
        in_llm, in_cross = split_tiles(self.config.architecture, len(tokens))
        # copied: a view would keep the tokens of all tiles in memory as long as the features are cached
        embeddings = tokens[in_llm].reshape(-1, tokens.shape[2]).copy()  # [m, hidden]
        embeddings.flags.writeable = False
        cross_kv = None
        if len(tokens[in_cross]):
            cross_kv = self.cross_kv(tokens[in_cross])
            cross_kv.flags.writeable = False
        return ImageFeatures(embeddings, cross_kv, len(tokens))

    def cross_kv(self, image_tokens: FloatArray) -> FloatArray:
        """Compute keys and values [cross layers, 2, kv_heads, C, head_dim] of the cross-attended tiles [n, T, hidden]
        of one image."""
        image_tokens = np.ascontiguousarray(image_tokens, np.float32)
        check_cross_tiles(self.config, len(image_tokens))
        with self._errors("cross_kv"):
            outputs = self._run_cross_kv(image_tokens)
        stacked = np.stack(outputs)
        return stacked.reshape(-1, 2, *stacked.shape[1:])

    def _run_cross_kv(self, image_tokens: FloatArray) -> list[FloatArray]:
        """Return key and value of each layer in turn, [kv_heads, C, head_dim] each."""
        return self._session("cross_kv").run(None, {"image_tokens": image_tokens})

    # --- slots -------------------------------------------------------------------------------------------------------

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        """Copy keys and values [cross layers, 2, kv_heads, C, head_dim] into a slot from token `start` on."""
        stop = start + features.cross_tokens
        self.limits.check_cross_tokens(stop)
        if features.cross_kv is None:
            return
        for j, (key, value) in enumerate(host_array(features.cross_kv)):
            self._cache[f"cross_key.{j}"][slot, :, start:stop] = key
            self._cache[f"cross_value.{j}"][slot, :, start:stop] = value

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> FloatArray:
        """Return rows start .. stop - 1 of the concatenated embeddings of all images: [M, hidden]."""
        rows = [host_array(part) for part in embedding_rows(images, start, stop)]
        return rows[0] if len(rows) == 1 else np.concatenate([self._no_embeddings, *rows])

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        wants_logits: bool = True,
    ) -> FloatArray:
        """Run input_ids [S] of one slot from `position` on. Returns the logits [vocab] of the last token, or, without
        `wants_logits`, an empty array: nothing is computed then that only these logits need."""
        first_wanted = len(input_ids) - int(wants_logits)
        logits = self._step(slot, input_ids[None], np.array([position]), embeddings, cross_ranges[None], first_wanted)
        return logits.reshape(-1).copy()

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        """Run one token of each slot 0 .. n-1. Returns logits [n, vocab], valid until the next call."""
        return self._step(0, input_ids[:, None], positions, self._no_embeddings, cross_ranges[:, None])

    def score_tokens(
        self, slot: int, position: int, input_ids: IntArray, cross_ranges: RangeArray
    ) -> FloatArray | None:
        """Run input_ids [S] of one slot from `position` on. Returns the logits [S, vocab] of all tokens, or None for an
        engine of an earlier version, whose logit_index has no second dimension."""
        if not self._several_logits:
            return None
        return self._step(slot, input_ids[None], np.array([position]), self._no_embeddings, cross_ranges[None])

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        """Copy the used part of one slot to another."""
        for name, cache in self._cache.items():
            used = cross_length if name.startswith("cross_") else length
            cache[target, :, :used] = cache[source, :, :used]

    def swap_slots(self, first: int, second: int, length: int, cross_length: int) -> None:
        """Exchange the used parts of two slots."""
        for name, cache in self._cache.items():
            used = cross_length if name.startswith("cross_") else length
            kept = cache[first, :, :used].copy()
            cache[first, :, :used] = cache[second, :, :used]
            cache[second, :, :used] = kept

    def _step(
        self,
        first_slot: int,
        input_ids: IntArray,
        positions: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        first_wanted: int = 0,
    ) -> FloatArray:
        """Run input_ids [B, S], positions [B], embeddings [M, hidden], cross_ranges [B, S, 2] of the B slots from
        first_slot on. Returns the logits [B * (S - first_wanted), vocab] of the tokens from `first_wanted` on; with an
        earlier engine, those of the last tokens [B, vocab]."""
        batch, tokens = input_ids.shape
        if not self._several_logits:
            first_wanted = tokens - 1
        check_embeddings(int(np.count_nonzero(input_ids == self.config.image_token_id)), len(embeddings))
        self.limits.check_sequence(int(positions.max()) + tokens)
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "image_tokens": self._rows(embeddings),
            "write_indices": np.ascontiguousarray(positions, np.int64),
            "logit_index": self._wanted(batch, first_wanted, tokens),
        }
        if self.config.cross_layers:
            inputs["cross_ranges"] = np.ascontiguousarray(cross_ranges, np.int32)
        binding = self._decoder_binding(first_slot, first_slot + batch)
        rows = tokens - first_wanted
        logits = self._logits[first_slot : first_slot + batch]
        if rows != 1:
            logits = np.empty((batch * rows, self.config.llm.vocab_size), np.float32)
        bind_output(binding, "logits", logits)
        for name, array in inputs.items():
            bind_input(binding, name, array)
        self._run("decoder", binding)
        return logits

    def _wanted(self, batch: int, first: int, tokens: int) -> IntArray:
        """Return logit_index [B, R] for the tokens first .. tokens - 1 of each sequence; [B] for earlier engines."""
        wanted = np.tile(np.arange(first, tokens), (batch, 1))
        return wanted if self._several_logits else wanted[:, 0]

    def _rows(self, embeddings: BackendArray) -> FloatArray:
        """Return the decoder's input image_tokens for embeddings [M, hidden]."""
        return host_array(embeddings)

    # --- sessions and buffers ----------------------------------------------------------------------------------------

    def _decoder_binding(self, first: int, stop: int) -> IOBinding:
        """Bind the caches of slots first .. stop-1, once per range of slots."""
        if (first, stop) not in self._bindings:
            binding = self._session("decoder").io_binding()
            for name, cache in self._cache.items():
                bind_input(binding, name, cache[first:stop])
                if name.startswith("past_"):
                    bind_output(binding, name.replace("past_", "present_"), cache[first:stop])
            self._bindings[first, stop] = binding
        return self._bindings[first, stop]

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free sessions and caches; no method may be called afterwards."""
        self._bindings.clear()
        self._sessions.clear()
        self._encoder = None
        self._cache.clear()

    def to_host(self, array: BackendArray) -> FloatArray:
        return host_array(array)

    def _session(self, stage: str) -> InferenceSession:
        assert stage in self._sessions, f"{stage} was not opened"
        return self._sessions[stage]

    def _run(self, stage: str, binding: IOBinding) -> None:
        with self._errors(stage):
            self._session(stage).run_with_iobinding(binding)

    @contextlib.contextmanager
    def _errors(self, stage: str) -> Iterator[None]:
        try:
            yield
        except RUNTIME_ERRORS as error:
            raise EngineError(f"{stage} of engine {self._path} failed: {first_line(error)}") from error


def _takes_several(decoder: InferenceSession) -> bool:
    """Return whether a decoder computes the logits of several tokens of a sequence."""
    (wanted,) = (entry for entry in decoder.get_inputs() if entry.name == "logit_index")
    return len(wanted.shape) == 2


def _allocate(config: NvlmConfig, limits: EngineLimits) -> dict[str, FloatArray]:
    """Allocate the decoder's caches by input name, one row per slot.

    The operating system maps pages of zeros when they are written, so memory is taken as slots fill."""
    llm = config.llm
    shape = (limits.max_slots, llm.num_kv_heads, limits.max_seq_len, llm.head_dim)
    cross_tokens = cache_length(limits.max_image_tokens)
    cross_shape = (limits.max_slots, llm.num_kv_heads, cross_tokens, llm.head_dim)
    cache = {}
    try:
        for kind in ("key", "value"):
            for i in range(llm.num_layers):
                cache[f"past_{kind}.{i}"] = np.zeros(shape, np.float32)
            for j in range(len(config.cross_layers)):
                cache[f"cross_{kind}.{j}"] = np.zeros(cross_shape, np.float32)
    except MemoryError:
        raise EngineError(
            f"no memory for the caches of {limits.max_slots} slots of {limits.max_seq_len} tokens; rebuild with a "
            "smaller --max-slots or --max-seq-len"
        ) from None
    return cache
