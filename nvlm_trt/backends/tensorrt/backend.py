"""TensorRT on a GPU: a plan per component, caches on the GPU that the decoder updates in place.

A slot is a row of every cache: rows [slot : slot + 1] are bound to prefill one, rows [0 : n] to decode. Prefill and
decoding are two optimisation profiles; a decoding step of n slots is one CUDA graph, recorded when first needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import COMPONENTS, FloatArray, IntArray, RangeArray
from nvlm_trt.backends.request_checks import check_cross_tokens, check_step, check_tiles
from nvlm_trt.backends.tensorrt.device_tokens import DeviceTokens
from nvlm_trt.backends.tensorrt.loaded_plan import GpuMemoryError, Stage
from nvlm_trt.backends.tensorrt.target import check_target, find_target, import_torch
from nvlm_trt.engine import Engine, EngineLimits
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig

_PREFILL, _DECODE = 0, 1  # the decoder's optimisation profiles


class TensorRtBackend:
    """Implements `Backend` for an engine of the backend "tensorrt"."""

    def __init__(self, engine: Engine, components: Collection[str], device: str) -> None:
        """Raises EngineError without TensorRT or a GPU, for an engine of another version or GPU, and for want of
        memory."""
        check_target(engine, find_target(device))
        assert engine.manifest.tensorrt is not None, "check_target has looked"
        self._record = engine.manifest.tensorrt
        self._torch = import_torch()
        self._device = device
        self.config: NvlmConfig = engine.config
        self.limits: EngineLimits = engine.limits
        self._dtype = {"fp32": self._torch.float32, "fp16": self._torch.float16, "bf16": self._torch.bfloat16}[
            self._record.dtype
        ]
        wanted = [name for name in COMPONENTS if name in components and name in self._record.profiles]
        self._stages = {name: self._open(engine.path, name) for name in wanted}
        self._graphs: dict[int, tuple[Any, dict[str, Any]]] = {}  # slots -> CUDA graph, its tensors
        self._cache: dict[str, Any] = {}
        if "decoder" in self._stages:
            self._check_aliases(engine.path)
            self._allocate()

    def __enter__(self) -> TensorRtBackend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free plans and caches; no method may be called afterwards."""
        self._graphs.clear()
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()
        self._cache.clear()
        self._torch.cuda.empty_cache()  # TensorRT's builder, for one, allocates beside torch

    # --- images ------------------------------------------------------------------------------------------------------

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """[tiles, 3, E, E] -> image tokens [tiles, T, hidden]."""
        stage, torch = self._stage("vision_encoder"), self._torch
        shape = (len(pixel_values), self.config.tokens_per_tile, self.config.llm.hidden_size)
        most = self._record.profiles["vision_encoder"][0]["pixel_values"][-1][0]
        with torch.cuda.stream(stage.stream):
            image_tokens = torch.empty(shape, dtype=self._dtype, device=self._device)
            for start in range(0, len(pixel_values), most):
                pixels = self._upload(pixel_values[start : start + most])
                tensors = {"pixel_values": pixels, "image_tokens": image_tokens[start : start + most]}
                stage.run(0, tensors)
                stage.stream.synchronize()  # before the pixels' memory is used again
            return _numpy(image_tokens)

    def cross_kv(self, image_tokens: FloatArray) -> FloatArray:
        """One image's cross-attended tiles [n, T, hidden] -> [cross layers, 2, kv_heads, C, head_dim]."""
        tiles = len(image_tokens)
        check_tiles(self.config, tiles)
        stage, torch = self._stage("cross_kv"), self._torch
        layers = len(self.config.cross_layers)
        with torch.cuda.stream(stage.stream):
            tensors = {"image_tokens": self._upload(image_tokens)}
            shape = stage.output_shape(0, tensors, "cross_key.0")  # [kv_heads, C, head_dim]
            # one by one: TensorRT wants addresses that are multiples of 256, as those of allocations are
            names = [f"cross_{kind}.{j}" for j in range(layers) for kind in ("key", "value")]
            outputs = {name: torch.empty(shape, dtype=self._dtype, device=self._device) for name in names}
            stage.run(0, tensors | outputs)
            return _numpy(torch.stack(list(outputs.values()))).reshape(layers, 2, *shape)

    def write_cross_kv(self, slot: int, start: int, cross_kv: FloatArray) -> None:
        """Copy [cross layers, 2, kv_heads, C, head_dim] into a slot from token `start` on."""
        stop = start + cross_kv.shape[3]
        check_cross_tokens(self.limits, stop)
        with self._torch.cuda.stream(self._stage("decoder").stream):
            for j, (key, value) in enumerate(self._upload(cross_kv)):
                self._cache[f"cross_key.{j}"][slot, :, start:stop] = key
                self._cache[f"cross_value.{j}"][slot, :, start:stop] = value

    # --- text --------------------------------------------------------------------------------------------------------

    def prefill(
        self, slot: int, position: int, input_ids: IntArray, image_tokens: FloatArray, cross_ranges: RangeArray
    ) -> FloatArray:
        """input_ids [S] of one slot from `position` on -> the last token's logits [vocab]."""
        is_image = input_ids == self.config.image_token_id
        check_step(self.limits, int(is_image.sum()), len(image_tokens), position + len(input_ids))
        chunk = self._record.profiles["decoder"][_PREFILL]["input_ids"][-1][1]
        stage, torch = self._stage("decoder"), self._torch
        with torch.cuda.stream(stage.stream):
            used = 0
            for start in range(0, len(input_ids), chunk):
                here = slice(start, start + chunk)
                images = image_tokens[used : used + int(is_image[here].sum())]
                used += len(images)
                tensors = self._step_tensors(1, len(input_ids[here]), max(len(images), 1))
                step: dict[str, npt.NDArray[Any]] = {
                    "input_ids": input_ids[None, here],
                    "write_indices": np.array([position + start]),
                    "logit_index": np.array([len(input_ids[here]) - 1]),
                    "cross_ranges": cross_ranges[None, here],
                }
                self._fill(tensors, step)
                if len(images):
                    tensors["image_tokens"].copy_(self._upload(images))
                stage.run(_PREFILL, tensors | self._rows(slot, slot + 1))
                stage.stream.synchronize()  # before the step's memory is used again
            logits: FloatArray = _numpy(tensors["logits"])[0]
            return logits

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        """One token of each of the slots 0 .. n-1 -> logits [n, vocab], valid until the next call."""
        slots = len(input_ids)
        check_step(self.limits, int((input_ids == self.config.image_token_id).sum()), 0, int(positions.max()) + 1)
        stage = self._stage("decoder")
        step: dict[str, npt.NDArray[Any]] = {
            "input_ids": input_ids[:, None],
            "write_indices": positions,
            "cross_ranges": cross_ranges[:, None],
        }
        with self._torch.cuda.stream(stage.stream):
            recorded = self._graphs.get(slots)
            tensors = recorded[1] if recorded else self._step_tensors(slots, 1, 1)
            self._fill(tensors, step)
            if recorded is None:
                # the run before recording writes the very keys and values that the replay writes again
                recorded = stage.record(_DECODE, tensors | self._rows(0, slots)), tensors
                self._graphs[slots] = recorded
            recorded[0].replay()
            return _numpy(tensors["logits"])

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        """Copy the tokens in use of one slot over another."""
        with self._torch.cuda.stream(self._stage("decoder").stream):
            for name, cache in self._cache.items():
                used = cross_length if name.startswith("cross_") else length
                cache[target, :, :used] = cache[source, :, :used]

    # --- plans and buffers -------------------------------------------------------------------------------------------

    def _open(self, directory: Path, component: str) -> Stage:
        weights = directory / f"{component}.onnx" if self._record.stripped else None
        plan = directory / f"{component}.plan"
        with _memory_errors(self._torch, str(plan)):
            return Stage(plan, self._device, weights, self._record.weight_streaming)

    def _check_aliases(self, directory: Path) -> None:
        aliased = self._stages["decoder"].aliased()
        if aliased != self._record.aliased:
            odd = sorted(set(aliased.items()) ^ set(self._record.aliased.items()))[0][0]
            raise EngineError(
                f"decoder of {directory} does not update {odd} in place as its manifest says; rebuild it with "
                "`nvlm-trt build`"
            )

    def _allocate(self) -> None:
        """The decoder's caches by input name, a row per slot; zeros, since attention may multiply what is not used."""
        largest = {name: shapes[-1] for name, shapes in self._record.profiles["decoder"][_DECODE].items()}
        with _memory_errors(self._torch, f"the caches of {self.limits.max_slots} slots"):
            self._cache = {
                name: self._torch.zeros(shape, dtype=self._dtype, device=self._device)
                for name, shape in largest.items()
                if name.startswith(("past_", "cross_key.", "cross_value."))
            }

    def _rows(self, first: int, stop: int) -> dict[str, Any]:
        """The caches of slots first .. stop-1, as inputs and as the outputs that alias them."""
        rows = {name: cache[first:stop] for name, cache in self._cache.items()}
        return rows | {output: rows[source] for output, source in self._record.aliased.items()}

    def _step_tensors(self, batch: int, tokens: int, image_tokens: int) -> dict[str, Any]:
        """What a run of the decoder reads and writes beside the caches; logit_index is 0."""
        torch, llm = self._torch, self.config.llm
        shapes = {
            "input_ids": ((batch, tokens), torch.int64),
            "image_tokens": ((image_tokens, llm.hidden_size), self._dtype),
            "write_indices": ((batch,), torch.int64),
            "logit_index": ((batch,), torch.int64),
            "logits": ((batch, llm.vocab_size), torch.float32),
        }
        if self.config.cross_layers:
            shapes["cross_ranges"] = ((batch, tokens, 2), torch.int32)
        return {name: torch.zeros(shape, dtype=dtype, device=self._device) for name, (shape, dtype) in shapes.items()}

    def _fill(self, tensors: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> None:
        for name, array in arrays.items():
            if name in tensors:
                tensors[name].copy_(self._torch.from_numpy(np.ascontiguousarray(array)))

    def _upload(self, array: FloatArray | DeviceTokens) -> Any:
        """On the GPU and in the engine's type; the very memory of tokens that are so already."""
        if isinstance(array, DeviceTokens):
            cuda = self._torch.cuda
            # they were made on the default stream, which torch's other streams do not wait for
            cuda.current_stream(self._device).wait_stream(cuda.default_stream(self._device))
            return array.tensor.to(self._device, self._dtype)
        return self._torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self._device, self._dtype)

    def _stage(self, component: str) -> Stage:
        assert component in self._stages, f"{component} was not opened"
        return self._stages[component]


@contextlib.contextmanager
def _memory_errors(torch: Any, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuMemoryError(
            f"no GPU memory for {what}; free the GPU, or rebuild with a smaller --max-slots or --max-seq-len"
        ) from error


def _numpy(tensor: Any) -> FloatArray:
    """Copied to the host, which waits for what is queued."""
    array: FloatArray = tensor.float().cpu().numpy()
    return array
