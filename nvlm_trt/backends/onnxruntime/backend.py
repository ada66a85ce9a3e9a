"""ONNX Runtime on the CPU: one session per component, caches in numpy arrays that the sessions update in place.

A slot is a row of every cache. A pointer to cache[lo:hi] is bound as input and output of the decoder, so the new keys
and values are written where they belong and nothing is copied: [slot:slot + 1] to prefill one slot, [0:n] to decode.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_errors

from nvlm_trt.backends.base import COMPONENTS, FloatArray, IntArray, RangeArray
from nvlm_trt.backends.request_checks import check_cross_tokens, check_step, check_tiles
from nvlm_trt.engine import Engine, EngineLimits
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.plugins.gated_cross_attention import cache_length

_RUNTIME_ERRORS = (
    runtime_errors.EPFail,
    runtime_errors.Fail,
    runtime_errors.InvalidArgument,
    runtime_errors.InvalidGraph,
    runtime_errors.InvalidProtobuf,
    runtime_errors.NoModel,
    runtime_errors.NoSuchFile,
    runtime_errors.NotImplemented,
    runtime_errors.RuntimeException,
    RuntimeError,
)

# A thread without work waits this long before it sleeps, long enough for the gap between two operators. Unbounded
# spinning would take the cores from other processes: beside a busy one, a decoding step took 1.7 times as long.
_SPIN_US = 100
_CAN_BOUND_SPINNING = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 32)

# Tiles encoded at once: one tile fills the cores already, more only take memory.
_ENCODE_TILES = 2


class OnnxRuntimeBackend:
    """Implements `Backend` for an engine of the backend "onnxruntime"."""

    def __init__(self, engine: Engine, components: Collection[str], threads: int | None) -> None:
        unknown = set(components) - set(COMPONENTS)
        assert not unknown, f"components are {COMPONENTS}, not {unknown}"
        self.config: NvlmConfig = engine.config
        self.limits: EngineLimits = engine.limits
        self._path = engine.path
        if not self.config.cross_layers:
            components = set(components) - {"cross_kv"}
        self._sessions = {
            name: _open_session(engine.path / f"{name}.onnx", threads) for name in COMPONENTS if name in components
        }
        self._cache = _allocate(self.config, self.limits) if "decoder" in self._sessions else {}
        self._logits = np.empty((self.limits.max_slots, self.config.llm.vocab_size), np.float32)
        self._no_image_tokens = np.empty((0, self.config.llm.hidden_size), np.float32)
        self._bindings: dict[tuple[int, int], onnxruntime.IOBinding] = {}  # by first slot and the one after the last

    def __enter__(self) -> OnnxRuntimeBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free sessions and caches; no method may be called afterwards."""
        self._bindings.clear()
        self._sessions.clear()
        self._cache.clear()

    # --- images ------------------------------------------------------------------------------------------------------

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """[tiles, 3, E, E] -> image tokens [tiles, T, hidden]."""
        pixel_values = np.ascontiguousarray(pixel_values, np.float32)
        image_tokens = np.empty(
            (len(pixel_values), self.config.tokens_per_tile, self.config.llm.hidden_size), np.float32
        )
        for start in range(0, len(pixel_values), _ENCODE_TILES):
            tiles = slice(start, start + _ENCODE_TILES)
            binding = self._session("vision_encoder").io_binding()
            _bind_input(binding, "pixel_values", pixel_values[tiles])
            _bind_output(binding, "image_tokens", image_tokens[tiles])
            self._run("vision_encoder", binding)
        return image_tokens

    def cross_kv(self, image_tokens: FloatArray) -> FloatArray:
        """One image's cross-attended tiles [n, T, hidden] -> [cross layers, 2, kv_heads, C, head_dim]."""
        image_tokens = np.ascontiguousarray(image_tokens, np.float32)
        check_tiles(self.config, len(image_tokens))
        with self._errors("cross_kv"):
            outputs = self._run_cross_kv(image_tokens)
        stacked = np.stack(outputs)
        return stacked.reshape(-1, 2, *stacked.shape[1:])

    def _run_cross_kv(self, image_tokens: FloatArray) -> list[FloatArray]:
        """Key and value of every layer in turn, [kv_heads, C, head_dim] each."""
        return self._session("cross_kv").run(None, {"image_tokens": image_tokens})

    def write_cross_kv(self, slot: int, start: int, cross_kv: FloatArray) -> None:
        """Copy [cross layers, 2, kv_heads, C, head_dim] into a slot from token `start` on."""
        stop = start + cross_kv.shape[3]
        check_cross_tokens(self.limits, stop)
        for j, (key, value) in enumerate(cross_kv):
            self._cache[f"cross_key.{j}"][slot, :, start:stop] = key
            self._cache[f"cross_value.{j}"][slot, :, start:stop] = value

    # --- text --------------------------------------------------------------------------------------------------------

    def prefill(
        self, slot: int, position: int, input_ids: IntArray, image_tokens: FloatArray, cross_ranges: RangeArray
    ) -> FloatArray:
        """input_ids [S] of one slot from `position` on -> the last token's logits [vocab]."""
        return self._step(slot, input_ids[None], np.array([position]), image_tokens, cross_ranges[None])[0].copy()

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        """One token of each of the slots 0 .. n-1 -> logits [n, vocab], valid until the next call."""
        return self._step(0, input_ids[:, None], positions, self._no_image_tokens, cross_ranges[:, None])

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        """Copy the tokens in use of one slot over another."""
        for name, cache in self._cache.items():
            used = cross_length if name.startswith("cross_") else length
            cache[target, :, :used] = cache[source, :, :used]

    def _step(
        self,
        first_slot: int,
        input_ids: IntArray,
        positions: IntArray,
        image_tokens: FloatArray,
        cross_ranges: RangeArray,
    ) -> FloatArray:
        """input_ids [B, S], positions [B], cross_ranges [B, S, 2] of slots first_slot .. -> logits [B, vocab]."""
        batch, tokens = input_ids.shape
        places = np.count_nonzero(input_ids == self.config.image_token_id)
        check_step(self.limits, places, len(image_tokens), int(positions.max()) + tokens)
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "image_tokens": np.ascontiguousarray(image_tokens, np.float32),
            "write_indices": np.ascontiguousarray(positions, np.int64),
            "logit_index": np.full(batch, tokens - 1, np.int64),
        }
        if self.config.cross_layers:
            inputs["cross_ranges"] = np.ascontiguousarray(cross_ranges, np.int32)
        binding = self._decoder_binding(first_slot, first_slot + batch)
        for name, array in inputs.items():
            _bind_input(binding, name, array)
        self._run("decoder", binding)
        return self._logits[first_slot : first_slot + batch]

    # --- sessions and buffers ----------------------------------------------------------------------------------------

    def _decoder_binding(self, first: int, stop: int) -> onnxruntime.IOBinding:
        """The caches and logits of slots first .. stop-1, bound once per range of slots."""
        if (first, stop) not in self._bindings:
            binding = self._session("decoder").io_binding()
            for name, cache in self._cache.items():
                _bind_input(binding, name, cache[first:stop])
                if name.startswith("past_"):
                    _bind_output(binding, name.replace("past_", "present_"), cache[first:stop])
            _bind_output(binding, "logits", self._logits[first:stop])
            self._bindings[first, stop] = binding
        return self._bindings[first, stop]

    def _session(self, component: str) -> onnxruntime.InferenceSession:
        assert component in self._sessions, f"{component} was not opened"
        return self._sessions[component]

    def _run(self, component: str, binding: onnxruntime.IOBinding) -> None:
        with self._errors(component):
            self._session(component).run_with_iobinding(binding)

    @contextlib.contextmanager
    def _errors(self, component: str) -> Iterator[None]:
        try:
            yield
        except _RUNTIME_ERRORS as error:
            raise EngineError(f"{component} of engine {self._path} failed: {_first_line(error)}") from error


def _allocate(config: NvlmConfig, limits: EngineLimits) -> dict[str, FloatArray]:
    """The decoder's caches by input name, a row per slot. Zeros are mapped lazily: memory is taken as slots fill."""
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


def _open_session(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if _CAN_BOUND_SPINNING else "0")
    if _CAN_BOUND_SPINNING:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _RUNTIME_ERRORS as error:
        raise EngineError(
            f"engine file {path} cannot be loaded ({_first_line(error)}); rebuild the engine with `nvlm-trt build`"
        ) from error


def _bind_input(binding: onnxruntime.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    """By pointer: `array` is contiguous and outlives the run."""
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: onnxruntime.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
