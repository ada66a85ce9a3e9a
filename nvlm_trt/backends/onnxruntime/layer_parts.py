"""Runs single parts of a model with ONNX Runtime, for a calibration by layer: the observing graphs, cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from nvlm_trt.backends.base import FloatArray, RangeArray
from nvlm_trt.backends.onnxruntime import ENCODE_TILES
from nvlm_trt.backends.onnxruntime.session import (
    RUNTIME_ERRORS,
    bind_input,
    bind_output,
    first_line,
    open_session,
    session_options,
)
from nvlm_trt.builders.graphs.common import HIDDEN, HIDDEN_OUT
from nvlm_trt.builders.graphs.cross_kv import cross_kv_graph
from nvlm_trt.builders.graphs.decoder import decoder_layer_graph, head_graph
from nvlm_trt.builders.graphs.self_attention import GroupQueryAttention
from nvlm_trt.builders.graphs.vision_attention import multi_head_vision_attention
from nvlm_trt.builders.graphs.vision_encoder import patches_graph, projector_graph, vision_layer_graph
from nvlm_trt.builders.model_file import save_model
from nvlm_trt.builders.quantization.by_layer import (
    DECODER_LAYER,
    HEAD,
    PATCHES,
    VISION_LAYER,
    LlmPart,
    Part,
    VisionPart,
)
from nvlm_trt.builders.quantization.observations import Observations, images_are_read
from nvlm_trt.builders.quantization.observer import CHANNELS, COUNTS, LastObserver, Observer
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.errors import EngineError
from nvlm_trt.limits import EngineLimits
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.progress import no_progress
from nvlm_trt.staging import storage_errors

Array = npt.NDArray[Any]


class OnnxRuntimeParts:
    """Implements `PartRuntime`. Writes the graphs of a part, and its weights in fp32, into the part's folder."""

    def __init__(self, source: EngineSource) -> None:
        self._source = source

    @property
    def name(self) -> str:
        return f"ONNX Runtime {onnxruntime.__version__}"

    @contextlib.contextmanager
    def open_vision(self, part: Part, folder: Path) -> Iterator[VisionPart]:
        yield _VisionPart(self._opened(part, folder))

    @contextlib.contextmanager
    def open_llm(self, part: Part, folder: Path) -> Iterator[LlmPart]:
        graphs = self._opened(part, folder)
        if part.kind == HEAD:
            yield _Head(graphs)
        else:
            yield _DecoderLayer(self._source.config, self._source.limits, part.index, graphs)

    def _opened(self, part: Part, folder: Path) -> Mapping[str, _Graph]:
        """Write and load the graphs of a part. Raises EngineError for graphs that ONNX Runtime cannot load."""
        with self._source.open_checkpoint() as checkpoint, storage_errors(folder):
            for name, model in self._graphs(part, checkpoint).items():
                save_model(model, folder / f"{name}.onnx", no_progress)
        return {path.stem: _Graph(path, part) for path in folder.glob("*.onnx")}

    def _graphs(self, part: Part, checkpoint: Checkpoint) -> Mapping[str, ir.Model]:
        config, observer = self._source.config, Observer()
        if part.kind == PATCHES:
            return {"part": patches_graph(config, checkpoint, observer)}
        if part.kind == VISION_LAYER:
            return {"part": vision_layer_graph(config, checkpoint, observer, part.index, multi_head_vision_attention)}
        if part.kind == HEAD:
            return {"part": head_graph(config, checkpoint, LastObserver())}
        if part.kind != DECODER_LAYER:
            return {"part": projector_graph(config, checkpoint, observer)}
        limits = self._source.limits
        graphs = {"part": decoder_layer_graph(config, checkpoint, limits, observer, part.index, GroupQueryAttention)}
        if part.index in config.cross_layers:
            tags, blocks = self._source.tag_embeddings(checkpoint), [config.cross_layers.index(part.index)]
            graphs["cross_kv"] = cross_kv_graph(config, checkpoint, tags, observer, blocks=blocks)
        return graphs


class _Graph:
    """One session, which adds up its reports."""

    def __init__(self, path: Path, part: Part) -> None:
        self._part = part
        self._session = open_session(path, session_options(None))
        self.input_name: str = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.observations = Observations()

    def run(
        self, inputs: Mapping[str, Array], bound: Mapping[str, Array] | None = None, images_are_read: bool = True
    ) -> dict[str, FloatArray]:
        """Run once. Return the outputs that are neither reports nor `bound`, which are written in place."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            bind_input(binding, name, array)
        for name in self._outputs:
            if bound and name in bound:
                bind_output(binding, name, bound[name])
            else:
                binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except RUNTIME_ERRORS as error:
            raise EngineError(f"calibration: {self._part} failed: {first_line(error)}") from error
        values = {
            name: value.numpy()
            for name, value in zip(self._outputs, binding.get_outputs(), strict=True)
            if not (bound and name in bound)
        }
        reports = {name: values.pop(name) for name in self._outputs if name.startswith((CHANNELS, COUNTS))}
        self.observations.add_reports(reports, images_are_read)
        return values


class _OnnxPart:
    """Implements `OpenPart`."""

    def __init__(self, graphs: Mapping[str, _Graph]) -> None:
        self._graphs = graphs

    def observed(self) -> Observations:
        total = Observations()
        for graph in self._graphs.values():
            total.merge(graph.observations)
            graph.observations = Observations()
        return total


class _VisionPart(_OnnxPart):
    def encode(self, x: FloatArray) -> FloatArray:
        """Run a few tiles at a time, as an engine does."""
        graph = self._graphs["part"]
        given: list[FloatArray] = []
        for start in range(0, len(x), ENCODE_TILES):
            given += graph.run({graph.input_name: x[start : start + ENCODE_TILES]}).values()
        return np.concatenate(given)


class _DecoderLayer(_OnnxPart):
    def __init__(self, config: NvlmConfig, limits: EngineLimits, i: int, graphs: Mapping[str, _Graph]) -> None:
        super().__init__(graphs)
        llm, self._i = config.llm, i
        shape = (1, llm.num_kv_heads, limits.max_seq_len, llm.head_dim)
        self._past = {f"{kind}.{i}": np.zeros(shape, np.float32) for kind in ("key", "value")}
        self._cross: dict[str, FloatArray] = {}
        if "cross_kv" in graphs:
            j, cross_tokens = config.cross_layers.index(i), cache_length(limits.max_image_tokens)
            shape = (1, llm.num_kv_heads, cross_tokens, llm.head_dim)
            self._cross = {f"cross_{kind}.{j}": np.zeros(shape, np.float32) for kind in ("key", "value")}

    def read_images(self, images: Sequence[FloatArray]) -> None:
        start = 0
        for image_tokens in images:
            given = self._graphs["cross_kv"].run({"image_tokens": image_tokens})
            for name, values in given.items():  # [kv_heads, C, head_dim]
                stop = start + values.shape[1]
                self._cross[name][0, :, start:stop] = values
            start = stop

    def step(self, x: FloatArray, position: int, cross_ranges: RangeArray) -> FloatArray:
        inputs: dict[str, Array] = {HIDDEN: x[None], "write_indices": np.array([position], np.int64)}
        inputs |= {f"past_{name}": cache for name, cache in self._past.items()}
        if self._cross:
            inputs |= {**self._cross, "cross_ranges": np.ascontiguousarray(cross_ranges[None], np.int32)}
        present = {f"present_{name}": cache for name, cache in self._past.items()}
        return self._graphs["part"].run(inputs, present, images_are_read(cross_ranges))[HIDDEN_OUT][0]


class _Head(_OnnxPart):
    def read_images(self, images: Sequence[FloatArray]) -> None:
        assert not images, "no gated block stands behind the layers"

    def step(self, x: FloatArray, position: int, cross_ranges: RangeArray) -> FloatArray:
        self._graphs["part"].run({HIDDEN: x})
        return x[:0]
