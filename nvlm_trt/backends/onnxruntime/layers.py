"""Runs an engine a layer at a time: each stage in pieces of its graph, which read the stage's own data file.

The pieces have the nodes and weights that a server runs. A runtime joins no nodes of two pieces, and does not repack
the weights of large pieces, so bits may differ from those of the whole stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.backends.layers import ForcedSequence
from nvlm_trt.backends.onnxruntime import ENCODE_TILES
from nvlm_trt.backends.onnxruntime.graph_cut import Piece, cut
from nvlm_trt.backends.onnxruntime.session import (
    RUNTIME_ERRORS,
    InferenceSession,
    bind_input,
    bind_output,
    first_line,
    open_model,
    session_options,
)
from nvlm_trt.backends.onnxruntime.vision_runtime import STAGE, vision_runtime
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.layer_loop import Array, Layer, LayerLoop
from nvlm_trt.machine import available_cores
from nvlm_trt.plugins.gated_cross_attention import cache_length
from nvlm_trt.staging import storage_errors, temporary_sibling

# ONNX Runtime copies the weights that it repacks. Those of larger pieces stay as they are in the file, which is mapped.
_REPACKED_BYTES = 1 << 30
_LOGITS = "logits"

Run = Callable[[FloatArray], FloatArray]


class OnnxRuntimeLayers:
    """Implements `EngineLayers`."""

    def __init__(self, engine: Engine, loop: LayerLoop, threads: int | None) -> None:
        """`loop` runs the pieces, under names that begin with "engine:"."""
        self._engine, self._loop, self._threads = engine, loop, threads

    # --- vision encoder ----------------------------------------------------------------------------------------------

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """Encode pixel_values [tiles, 3, E, E] into image tokens [tiles, T, hidden]."""
        config, vision = self._engine.config, self._engine.config.vision
        pieces = cut(
            self._engine.path / f"{STAGE}.onnx",
            "image_tokens",
            residual=["tiles", vision.grid**2 + 1, vision.hidden_size],
            projected=["tiles", config.tokens_per_tile, config.projector_width or config.llm.hidden_size],
        )
        opened = self._in_openvino if vision_runtime(self._engine).uses_openvino else self._in_onnxruntime
        layers: list[Layer] = [partial(self._encode_piece, opened, piece) for piece in pieces]
        return self._loop.run("engine: vision encoder", [np.ascontiguousarray(pixel_values, np.float32)], layers)[0]

    def _encode_piece(
        self, opened: Callable[[Piece], contextlib.AbstractContextManager[Run]], piece: Piece, arrays: list[Array]
    ) -> list[Array]:
        """[tiles, ...] -> [tiles, ...]."""
        with opened(piece) as run, self._errors(STAGE):
            return [run(arrays[0])]

    @contextlib.contextmanager
    def _in_onnxruntime(self, piece: Piece) -> Iterator[Run]:
        session = self._open(STAGE, piece)
        (name,) = piece.inputs

        def run(x: FloatArray) -> FloatArray:
            groups = (x[start : start + ENCODE_TILES] for start in range(0, len(x), ENCODE_TILES))
            return np.concatenate([session.run(None, {name: group})[0] for group in groups])

        yield run

    @contextlib.contextmanager
    def _in_openvino(self, piece: Piece) -> Iterator[Run]:
        from nvlm_trt.backends.openvino.encoder import OpenVinoEncoder

        # OpenVINO reads weights beside the graph only, and follows no link to another folder
        with temporary_sibling(self._engine.path.absolute()) as folder:
            file = folder / f"{STAGE}.onnx"
            with storage_errors(file):
                piece.write(file, self._engine.path / f"{STAGE}.onnx.data")
            yield OpenVinoEncoder(file, self._threads or available_cores()).encode

    # --- decoder -----------------------------------------------------------------------------------------------------

    def logits(self, sequences: Sequence[ForcedSequence]) -> list[FloatArray]:
        """Run each sequence: its prompt at once, then token by token -> the logits [1 + S - P, vocab] of every run's
        last token."""
        for sequence in sequences:
            self._engine.limits.check_sequence(len(sequence.input_ids))
        width = self._engine.config.llm.hidden_size
        pieces = cut(self._engine.path / "decoder.onnx", _LOGITS, residual=["batch", "sequence", width])
        layers: list[Layer] = [partial(self._decode_piece, piece, sequences) for piece in pieces]
        return self._loop.run("engine: decoder", [], layers)

    def _decode_piece(self, piece: Piece, sequences: Sequence[ForcedSequence], arrays: list[Array]) -> list[Array]:
        """[S, hidden] of each sequence -> as they are, or the logits [1 + S - P, vocab]."""
        session = self._open("decoder", piece)
        with self._errors("decoder"):
            return [
                np.concatenate(list(self._steps(session, piece, sequence, arrays[index] if piece.takes else None)))
                for index, sequence in enumerate(sequences)
            ]

    def _steps(
        self, session: InferenceSession, piece: Piece, sequence: ForcedSequence, x: FloatArray | None
    ) -> Iterator[FloatArray]:
        """Run the steps of one sequence in turn; x [S, hidden] -> [tokens of a step, hidden], of the last layer [1,
        hidden], or logits [1, vocab]."""
        llm = self._engine.config.llm
        caches = self._caches(piece, sequence)
        several = any(len(value.shape) == 2 for value in session.get_inputs() if value.name == "logit_index")
        is_last, selects = piece.returns == _LOGITS, "logit_index" in piece.inputs
        for number, step in enumerate(sequence.steps):
            tokens, is_prompt = step.stop - step.start, step.start == 0
            last = np.array([tokens - 1])
            given: dict[str, npt.NDArray[Any]] = {
                **caches,
                "input_ids": sequence.input_ids[None, step],
                "cross_ranges": sequence.cross_ranges[None, step],
                "write_indices": np.array([step.start]),
                "logit_index": last[None] if several else last,
                "image_tokens": sequence.image_tokens[: None if is_prompt else 0],
            }
            if piece.takes is not None and x is not None:
                # the last layer, or in earlier engines the part behind it, selects the last token of a step
                is_selected = is_last and not selects
                given[piece.takes] = x[None, number : number + 1] if is_selected else x[None, step]
            inputs = {name: np.ascontiguousarray(given[name]) for name in piece.inputs}
            rows = 1 if selects else tokens
            result = np.empty((1, llm.vocab_size) if is_last else (1, rows, llm.hidden_size), np.float32)
            written = {name.replace("past_", "present_"): cache for name, cache in caches.items() if "past_" in name}
            binding = session.io_binding()
            for name, array in inputs.items():
                bind_input(binding, name, array)
            for name, array in {**written, piece.returns: result}.items():
                bind_output(binding, name, array)
            session.run_with_iobinding(binding)
            yield result if is_last else result[0]

    def _caches(self, piece: Piece, sequence: ForcedSequence) -> dict[str, FloatArray]:
        """Allocate the caches that a piece reads, one slot each: those of cross-attention filled."""
        llm, limits = self._engine.config.llm, self._engine.limits
        cross_tokens = cache_length(limits.max_image_tokens)
        caches = {}
        for name in piece.inputs:
            kind, _, number = name.partition(".")
            if kind in ("past_key", "past_value"):
                # the operating system maps pages of zeros when they are written
                caches[name] = np.zeros((1, llm.num_kv_heads, limits.max_seq_len, llm.head_dim), np.float32)
            elif kind in ("cross_key", "cross_value"):
                caches[name] = np.zeros((1, llm.num_kv_heads, cross_tokens, llm.head_dim), np.float32)
                if sequence.cross_kv is not None:
                    values = sequence.cross_kv[int(number), ("cross_key", "cross_value").index(kind)]
                    caches[name][0, :, : values.shape[1]] = values
        return caches

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _open(self, stage: str, piece: Piece) -> InferenceSession:
        options = session_options(self._threads)
        if piece.weight_bytes > _REPACKED_BYTES:
            options.add_session_config_entry("session.disable_prepacking", "1")
        return open_model(piece.model.SerializeToString(), self._engine.path / f"{stage}.onnx", options)

    @contextlib.contextmanager
    def _errors(self, stage: str) -> Iterator[None]:
        try:
            yield
        except RUNTIME_ERRORS as error:
            raise EngineError(f"{stage} of engine {self._engine.path} failed: {first_line(error)}") from error
