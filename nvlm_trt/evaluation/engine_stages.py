"""Runs the stages of an engine for `nvlm-trt verify`, each stage alone, whole or a layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.base import FloatArray, ImageFeatures, StepBackend
from nvlm_trt.backends.layers import EngineLayers, ForcedSequence
from nvlm_trt.backends.opening import backend_of, open_backend, open_layers
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.layer_loop import Array, Layer, LayerLoop
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import plan_engine
from nvlm_trt.runtime.pipeline import Pipeline

_NOTHING = np.empty((0, 0), np.float32)


def fits(engine: Engine, memory: float, tag_length: int) -> bool:
    """Whether `memory` bytes hold the engine. A GPU is not asked: its engines are opened whole or not at all.

    Raises EngineError for a backend that runs no single steps."""
    spec = backend_of(engine)
    if spec.open_generator is not None:
        raise EngineError(
            f"engine {engine.path} runs on {spec.name}, which batches by itself: its stages cannot be compared; "
            "compare answers with `nvlm-trt eval`"
        )
    plan = plan_engine(EngineDesign.of(engine, tag_length))
    # caches are mapped as slots fill, and few tokens of one slot run here
    needed = sum(stage.weights + stage.activations + stage.overhead for stage in plan.stages.values())
    return spec.device != "cpu" or needed <= memory


class EngineStages:
    """Opens what each method needs, and closes it before the method returns."""

    def __init__(self, engine: Engine, loop: LayerLoop, by_layers: bool) -> None:
        """`by_layers`: run vision encoder and decoder a layer at a time; see `fits`."""
        self._engine, self._loop = engine, loop
        self._layers: EngineLayers | None = open_layers(engine, loop) if by_layers else None

    def answer(self, question: str, image: bytes, tokens: int) -> list[int]:
        """Return the greedy tokens that the whole pipeline generates from an encoded image and text."""
        (generated,) = self._run("answer", [], partial(self._answer, question, image, tokens))
        return [int(token) for token in generated]

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """Encode pixel_values [tiles, 3, E, E] into image tokens [tiles, T, hidden]."""
        if self._layers is not None:
            return self._layers.encode(pixel_values)
        return self._run("vision encoder", [pixel_values], self._encode)[0]

    def cross_kv(self, image_tokens: FloatArray) -> FloatArray:
        """Compute keys and values [cross layers, 2, kv_heads, C, head_dim] of the image tokens [tiles, T, hidden] of an
        image of several tiles. The stage has no large weights, so it is opened whole."""
        return self._run("keys and values", [image_tokens], self._cross_kv)[0]

    def logits(self, sequences: Sequence[ForcedSequence]) -> list[FloatArray]:
        """Return the logits [1 + S - P, vocab] of each sequence: prompt at once, then token by token."""
        if self._layers is not None:
            return self._layers.logits(sequences)
        return self._run("decoder", [], partial(self._logits, sequences))

    def _run(self, stage: str, arrays: list[Array], layer: Layer) -> list[Array]:
        return self._loop.run(f"engine: {stage}", arrays, [layer])

    def _answer(self, question: str, image: bytes, tokens: int, arrays: list[Array]) -> list[Array]:
        with Pipeline.open(self._engine.path) as pipeline:
            sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
            deltas = pipeline.generate(ChatRequest([Message("user", question)], (image,), sampling, None))
            return [np.array([token for delta in deltas for token in delta.token_ids], np.int64)]

    def _encode(self, arrays: list[Array]) -> list[Array]:
        with open_backend(self._engine, ["vision_encoder"]) as backend:
            return [backend.to_host(backend.encode(arrays[0]))]

    def _cross_kv(self, arrays: list[Array]) -> list[Array]:
        with open_backend(self._engine, ["cross_kv"]) as backend:
            features = backend.features(backend.import_tokens(arrays[0]))
            assert features.cross_kv is not None, "an image of several tiles is cross-attended"
            return [backend.to_host(features.cross_kv)]

    def _logits(self, sequences: Sequence[ForcedSequence], arrays: list[Array]) -> list[Array]:
        with open_backend(self._engine, ["decoder"]) as backend:
            return [_forced(backend, sequence) for sequence in sequences]


def _forced(backend: StepBackend, sequence: ForcedSequence) -> FloatArray:
    """Run one sequence in slot 0 -> [1 + S - P, vocab]."""
    images = []
    if len(sequence.image_tokens) or sequence.cross_kv is not None:
        # nobody reads the elements of an empty array, and some importers refuse it
        image_tokens = backend.import_tokens(sequence.image_tokens) if len(sequence.image_tokens) else _NOTHING
        cross_kv = None if sequence.cross_kv is None else backend.import_tokens(sequence.cross_kv)
        images.append(ImageFeatures(image_tokens, cross_kv, tiles=1))
        backend.write_cross_kv(0, 0, images[0])
    prompt, *rest = sequence.steps
    embeddings = backend.embeddings(images, 0, len(sequence.image_tokens))
    rows = [backend.prefill(0, 0, sequence.input_ids[prompt], embeddings, sequence.cross_ranges[prompt])]
    for step in rest:
        positions = np.array([step.start])
        rows.append(backend.decode(sequence.input_ids[step], positions, sequence.cross_ranges[step])[0].copy())
    return np.stack(rows)
