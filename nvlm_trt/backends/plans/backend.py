"""Runs an engine of plans on a GPU: one plan per stage, caches on the GPU that the decoder updates in place.

A slot is a row of every cache: rows [slot : slot + 1] are bound to prefill a slot, rows [0 : n] to decode n slots.
Prefill and decoding are two optimisation profiles; a decoding step of n slots is one CUDA graph, recorded when it first
runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

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
)
from nvlm_trt.backends.plans.loaded_plan import LoadedPlan
from nvlm_trt.backends.plans.record import PlanRecord
from nvlm_trt.backends.plans.runtime import PlanRuntime
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.engine import Engine
from nvlm_trt.errors import DeviceMemoryError, EngineError
from nvlm_trt.limits import EngineLimits, check_embeddings
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.image_tokens import check_cross_tiles, split_tiles

_PREFILL, _DECODE = 0, 1  # the decoder's optimisation profiles


class PlanBackend(ClosedOnExit):
    """Implements `StepBackend`. Image tokens and features are torch tensors on the GPU."""

    def __init__(
        self, engine: Engine, stages: Collection[str], device: str, record: PlanRecord, runtime: PlanRuntime
    ) -> None:
        """Load the stages; the caller has checked that the engine's plans run here.

        Raises EngineError for a plan that cannot be loaded, and if memory does not suffice."""
        self._record, self._runtime, self._torch = record, runtime, runtime.torch
        self._device = device
        self.config: NvlmConfig = engine.config
        self.limits: EngineLimits = engine.limits
        self._dtype = {"fp32": self._torch.float32, "fp16": self._torch.float16, "bf16": self._torch.bfloat16}[
            self._record.dtype
        ]
        wanted = [stage for stage in STAGES if stage in stages and stage in self._record.profiles]
        self._plans = {stage: self._open(engine.path, stage) for stage in wanted}
        # slots -> CUDA graph (None: the plan cannot be recorded), its tensors
        self._graphs: dict[int, tuple[Any | None, dict[str, Any]]] = {}
        self._cache: dict[str, Any] = {}
        if "decoder" in self._plans:
            self._check_aliases(engine.path)
            self._allocate()

    # --- images ------------------------------------------------------------------------------------------------------

    def encode(self, pixel_values: FloatArray) -> BackendArray:
        """Encode pixel_values [tiles, 3, E, E] into image tokens [tiles, T, hidden]."""
        plan, torch = self._plan("vision_encoder"), self._torch
        shape = (len(pixel_values), self.config.tokens_per_tile, self.config.llm.hidden_size)
        most = self._record.profiles["vision_encoder"][0]["pixel_values"][-1][0]
        with torch.cuda.stream(plan.stream):
            image_tokens: BackendArray = torch.empty(shape, dtype=self._dtype, device=self._device)
            rows: Any = image_tokens
            for start in range(0, len(pixel_values), most):
                pixels = self._upload(pixel_values[start : start + most])
                plan.run(0, {"pixel_values": pixels, "image_tokens": rows[start : start + most]})
                plan.stream.synchronize()  # `pixels` may be freed now, and other streams may read the tokens
        return image_tokens

    def import_tokens(self, tokens: Any) -> BackendArray:
        """Copy image tokens [tiles, T, hidden] from outside and convert them to the engine's type."""
        torch = self._torch
        source = torch.from_numpy(np.ascontiguousarray(tokens)) if isinstance(tokens, np.ndarray) else tokens
        copy: BackendArray = torch.from_dlpack(source).to(self._device, self._dtype, copy=True)
        torch.cuda.current_stream(self._device).synchronize()  # the owner of `tokens` may free them now
        return copy

    def features(self, image_tokens: BackendArray) -> ImageFeatures:
        """Compute the features of one image from its image tokens [tiles, T, hidden]. Both stay on the GPU."""
        tokens: Any = image_tokens
        in_llm, in_cross = split_tiles(self.config.architecture, len(tokens))
        # copied: a view would keep the tokens of all tiles in memory as long as the features are cached
        embeddings = tokens[in_llm].reshape(-1, tokens.shape[2]).clone()  # [m, hidden]
        self._torch.cuda.current_stream(self._device).synchronize()
        crossed = tokens[in_cross]
        return ImageFeatures(embeddings, self.cross_kv(crossed) if len(crossed) else None, len(tokens))

    def cross_kv(self, image_tokens: Any) -> BackendArray:
        """Compute keys and values [cross layers, 2, kv_heads, C, head_dim] of the cross-attended tiles [n, T, hidden]
        of one image."""
        check_cross_tiles(self.config, len(image_tokens))
        plan, torch = self._plan("cross_kv"), self._torch
        layers = len(self.config.cross_layers)
        with torch.cuda.stream(plan.stream):
            tensors = {"image_tokens": self._upload(image_tokens)}
            shape = plan.output_shape(0, tensors, "cross_key.0")  # [kv_heads, C, head_dim]
            # allocated one by one: TensorRT needs addresses that are multiples of 256, and allocations have them
            names = [f"cross_{kind}.{j}" for j in range(layers) for kind in ("key", "value")]
            outputs = {name: torch.empty(shape, dtype=self._dtype, device=self._device) for name in names}
            plan.run(0, tensors | outputs)
            stacked: BackendArray = torch.stack(list(outputs.values())).reshape(layers, 2, *shape)
            plan.stream.synchronize()  # the decoder's stream reads it next
        return stacked

    # --- slots -------------------------------------------------------------------------------------------------------

    def write_cross_kv(self, slot: int, start: int, features: ImageFeatures) -> None:
        """Copy keys and values [cross layers, 2, kv_heads, C, head_dim] into a slot from `start` on, within the GPU."""
        stop = start + features.cross_tokens
        self.limits.check_cross_tokens(stop)
        if features.cross_kv is None:
            return
        stream = self._plan("decoder").stream
        with self._torch.cuda.stream(stream):
            for j, (key, value) in enumerate(self._upload(features.cross_kv)):
                self._cache[f"cross_key.{j}"][slot, :, start:stop] = key
                self._cache[f"cross_value.{j}"][slot, :, start:stop] = value
            stream.synchronize()  # the caller may free the features now

    def embeddings(self, images: Sequence[ImageFeatures], start: int, stop: int) -> BackendArray:
        """Return rows start .. stop - 1 of the concatenated embeddings of all images: [M, hidden]."""
        torch = self._torch
        none = torch.empty((0, self.config.llm.hidden_size), dtype=self._dtype, device=self._device)
        with torch.cuda.stream(self._plan("decoder").stream):
            joined: BackendArray = torch.cat([none, *map(self._upload, embedding_rows(images, start, stop))])
        return joined

    def prefill(
        self,
        slot: int,
        position: int,
        input_ids: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        wants_logits: bool = True,
    ) -> FloatArray:
        """Run input_ids [S] of one slot from `position` on. Returns the logits [vocab] of the last token.

        A plan computes the logits in every run, wanted or not."""
        is_image = input_ids == self.config.image_token_id
        check_embeddings(int(is_image.sum()), len(embeddings))
        self.limits.check_sequence(position + len(input_ids))
        chunk = self._record.profiles["decoder"][_PREFILL]["input_ids"][-1][1]
        plan, rows = self._plan("decoder"), self._upload(embeddings)  # [M, hidden]
        with self._torch.cuda.stream(plan.stream):
            used = 0
            for start in range(0, len(input_ids), chunk):
                here = slice(start, start + chunk)
                images = rows[used : used + int(is_image[here].sum())]
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
                    tensors["image_tokens"].copy_(images)
                plan.run(_PREFILL, tensors | self._rows(slot, slot + 1))
                plan.stream.synchronize()  # the next chunk may reuse this chunk's memory now
            logits: FloatArray = _numpy(tensors["logits"])[0]
            return logits

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        """Run one token of each slot 0 .. n-1. Returns logits [n, vocab], valid until the next call."""
        slots = len(input_ids)
        check_embeddings(int((input_ids == self.config.image_token_id).sum()), 0)
        self.limits.check_sequence(int(positions.max()) + 1)
        plan = self._plan("decoder")
        step: dict[str, npt.NDArray[Any]] = {
            "input_ids": input_ids[:, None],
            "write_indices": positions,
            "cross_ranges": cross_ranges[:, None],
        }
        with self._torch.cuda.stream(plan.stream):
            recorded = self._graphs.get(slots)
            tensors = recorded[1] if recorded else self._step_tensors(slots, 1, 1)
            self._fill(tensors, step)
            if recorded is None:
                # recording runs the step once: it writes the same keys and values that the step below writes again
                recorded = plan.record(_DECODE, tensors | self._rows(0, slots)), tensors
                self._graphs[slots] = recorded
            graph = recorded[0]
            if graph is None:
                plan.run(_DECODE, tensors | self._rows(0, slots))
            else:
                graph.replay()
            return _numpy(tensors["logits"])

    def score_tokens(self, slot: int, position: int, input_ids: IntArray, cross_ranges: RangeArray) -> None:
        """Return None: a plan computes the logits of one token per sequence."""

    def move_slot(self, source: int, target: int, length: int, cross_length: int) -> None:
        """Copy the used part of one slot to another."""
        with self._torch.cuda.stream(self._plan("decoder").stream):
            for name, cache in self._cache.items():
                used = cross_length if name.startswith("cross_") else length
                cache[target, :, :used] = cache[source, :, :used]

    def swap_slots(self, first: int, second: int, length: int, cross_length: int) -> None:
        """Exchange the used parts of two slots."""
        with self._torch.cuda.stream(self._plan("decoder").stream):
            for name, cache in self._cache.items():
                used = cross_length if name.startswith("cross_") else length
                kept = cache[first, :, :used].clone()
                cache[first, :, :used] = cache[second, :, :used]
                cache[second, :, :used] = kept

    # --- lifetime ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free plans and caches; no method may be called afterwards."""
        self._graphs.clear()
        for plan in self._plans.values():
            plan.close()
        self._plans.clear()
        self._cache.clear()
        self._runtime.close()
        self._torch.cuda.empty_cache()  # others allocate without torch, TensorRT's builder for example

    def to_host(self, array: BackendArray) -> FloatArray:
        return _numpy(array)

    # --- plans and buffers -------------------------------------------------------------------------------------------

    def _open(self, directory: Path, stage: str) -> LoadedPlan:
        plan = directory / f"{stage}.plan"
        with _memory_errors(self._torch, str(plan)):
            return LoadedPlan(plan, self._device, self._runtime)

    def _check_aliases(self, directory: Path) -> None:
        aliased = self._plans["decoder"].aliased()
        if aliased != self._record.aliased:
            odd = sorted(set(aliased.items()) ^ set(self._record.aliased.items()))[0][0]
            raise EngineError(
                f"decoder of {directory} does not update {odd} in place as its manifest says; rebuild it with "
                "`nvlm-trt build`"
            )

    def _allocate(self) -> None:
        """Allocate the decoder's caches by input name, one row per slot.

        The caches start as zeros, because attention may multiply the unused part by 0, and 0 times NaN is NaN."""
        largest = {name: shapes[-1] for name, shapes in self._record.profiles["decoder"][_DECODE].items()}
        with _memory_errors(self._torch, f"the caches of {self.limits.max_slots} slots"):
            self._cache = {
                name: self._torch.zeros(shape, dtype=self._dtype, device=self._device)
                for name, shape in largest.items()
                if name.startswith(("past_", "cross_key.", "cross_value."))
            }

    def _rows(self, first: int, stop: int) -> dict[str, Any]:
        """Return the caches of slots first .. stop-1, as inputs and as the outputs that share their memory."""
        rows = {name: cache[first:stop] for name, cache in self._cache.items()}
        return rows | {output: rows[source] for output, source in self._record.aliased.items()}

    def _step_tensors(self, batch: int, tokens: int, image_tokens: int) -> dict[str, Any]:
        """Allocate the decoder's inputs and outputs beside the caches; logit_index is 0."""
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

    def _upload(self, array: Any) -> Any:
        """Bring an array to the GPU in the engine's type. A tensor that is there in that type is not copied."""
        tensor = self._torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array
        return tensor.to(self._device, self._dtype)

    def _plan(self, stage: str) -> LoadedPlan:
        assert stage in self._plans, f"{stage} was not opened"
        return self._plans[stage]


@contextlib.contextmanager
def _memory_errors(torch: Any, what: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"no GPU memory for {what}; free the GPU, or rebuild with a smaller --max-slots or --max-seq-len"
        ) from error


def _numpy(tensor: Any) -> FloatArray:
    """Copy a tensor to the host, after everything that is queued on the current stream."""
    array: FloatArray = tensor.float().cpu().numpy()
    return array
