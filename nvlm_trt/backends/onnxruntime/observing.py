"""Measures a calibration: an observing engine answers samples through the whole pipeline (tiling, prefill, decoding).

Its answers are those of an ordinary engine. Every run also reports the inputs of the linear layers, which are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.api import ChatRequest, Message, SamplingParams
from nvlm_trt.backends.base import BackendArray, FloatArray, IntArray, RangeArray, stages_of
from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend
from nvlm_trt.backends.onnxruntime.session import InferenceSession, IOBinding
from nvlm_trt.builders.quantization.build_samples import rounds_of
from nvlm_trt.builders.quantization.calibration import Calibration, LinearInput
from nvlm_trt.builders.quantization.magnitudes import int8_clip
from nvlm_trt.builders.quantization.observer import CHANNELS, COUNTS
from nvlm_trt.builders.quantization.scale_watch import BLOCK, Scales, ScaleWatch
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError, ImageError, RequestError
from nvlm_trt.evaluation.answerers import answer_concurrently
from nvlm_trt.evaluation.samples import Sample, digest_of
from nvlm_trt.model.precision import component_of
from nvlm_trt.progress import Progress
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.batcher import Batcher
from nvlm_trt.runtime.pipeline import Pipeline

_MAX_TOKENS = 16  # every token of an answer takes a run, and adds little to the many tokens of the prompt
# Nearly every prompt takes one run. lm_head multiplies the last row of each run, which is read only at a prompt's end.
_PREFILL_CHUNK = 2048


def observe(engine_dir: Path, samples: Sequence[Sample], progress: Progress) -> Calibration:
    """Ask an engine of the recipe OBSERVING, and measure the inputs of its linear layers. Ignores the answers.

    Stops before the last sample if the scales do not move any more (`ScaleWatch`). Raises RequestError for a sample
    that the engine cannot hold, ImageError for an image that does not decode, and EngineError for inputs that are not
    finite or all zero."""
    engine = Engine.open(engine_dir)
    digest = digest_of(samples, progress)
    backend = ObservingBackend(engine)
    tokenizer = Tokenizer.from_directory(engine_dir)
    order = list(chain.from_iterable(rounds_of(samples)))
    watch = ScaleWatch()
    asked = 0
    # what is not run again is not observed again
    batcher = Batcher(backend, tokenizer, prefill_chunk=_PREFILL_CHUNK, reuse_prompts=False)
    with Pipeline(engine, batcher, tokenizer) as pipeline:
        progress("calibrating", 0, len(order))
        while asked < len(order):
            block = order[asked : asked + BLOCK]
            for _ in _answers(pipeline, block, engine.limits.max_slots):
                asked += 1
                progress("calibrating", asked, len(order))
            if watch.are_still(backend.scales()):
                break
    progress("calibrating", asked, asked)
    return Calibration(
        checkpoint_digest=engine.manifest.checkpoint_digest,
        samples={"count": asked, "of": len(order), "digest": digest},
        linears=backend.linears(),
    )


def _answers(pipeline: Pipeline, samples: Sequence[Sample], concurrency: int) -> Iterator[object]:
    """Answer samples, several at once, and yield once for each."""

    def ask(sample: Sample) -> str:
        sampling = SamplingParams(max_tokens=_MAX_TOKENS)
        for _ in pipeline.generate(ChatRequest([Message("user", sample.prompt)], tuple(sample.images), sampling)):
            pass
        return ""

    try:
        yield from answer_concurrently(ask, samples, concurrency)
    except (RequestError, ImageError) as error:
        raise type(error)(f"calibration {error}") from None


class ObservingBackend(OnnxRuntimeBackend):
    """Runs an engine whose linear layers have the format Observer, and adds up their reports."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, stages_of(engine.config), threads=None)
        self._reports = {component: _report_arrays(session) for component, session in self._sessions.items()}
        self._channels: dict[str, FloatArray] = {}
        self._counts: dict[str, npt.NDArray[np.int64]] = {}
        self._cross_attends = False

    def scales(self) -> Scales:
        """Return abs_max and clip seen so far, by layer, for the layers that were reached.

        Raises EngineError for a layer whose inputs are not finite."""
        largest = {name: _largest(name, channels) for name, channels in self._channels.items()}
        return {name: (abs_max, int8_clip(self._counts[name], abs_max)) for name, abs_max in largest.items()}

    def linears(self) -> dict[str, LinearInput]:
        """Return the inputs seen so far, by layer, for the layers that were reached.

        Raises EngineError for a layer whose inputs are not finite, or all zero."""
        return {name: _linear_input(name, channels, self._counts[name]) for name, channels in self._channels.items()}

    def _run_cross_kv(self, image_tokens: FloatArray) -> list[FloatArray]:
        names = [output.name for output in self._session("cross_kv").get_outputs()]
        outputs = dict(zip(names, super()._run_cross_kv(image_tokens), strict=True))
        self._add_up({name: outputs.pop(name) for name in self._reports["cross_kv"]})
        return list(outputs.values())

    def decode(self, input_ids: IntArray, positions: IntArray, cross_ranges: RangeArray) -> FloatArray:
        """Run slots that attend to images, and slots that do not, apart: a run reports all of its slots."""
        attends = cross_ranges[:, 0] < cross_ranges[:, 1]  # [n]
        changes = np.flatnonzero(attends[1:] != attends[:-1]) + 1
        for first, stop in pairwise([0, *changes.tolist(), len(attends)]):
            slots = slice(first, stop)
            self._step(first, input_ids[slots, None], positions[slots], self._no_embeddings, cross_ranges[slots, None])
        return self._logits[: len(attends)]

    def _step(
        self,
        first_slot: int,
        input_ids: IntArray,
        positions: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        first_wanted: int = 0,
    ) -> FloatArray:
        # an observing graph runs the gated blocks for text alone too, and discards their results: not measured
        self._cross_attends = bool((cross_ranges[..., 0] < cross_ranges[..., 1]).any())
        # a layer that multiplies no token has no largest magnitude to report
        first_wanted = min(first_wanted, input_ids.shape[1] - 1)
        return super()._step(first_slot, input_ids, positions, embeddings, cross_ranges, first_wanted)

    def _run(self, component: str, binding: IOBinding) -> None:
        reports = self._reports[component]
        for name, array in reports.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        super()._run(component, binding)
        self._add_up(reports)

    def _add_up(self, reports: Mapping[str, FloatArray]) -> None:
        for output, values in reports.items():
            if output.startswith(CHANNELS):
                name = output.removeprefix(CHANNELS)
                if self._is_used(name):
                    before = self._channels.get(name, np.zeros_like(values))
                    self._channels[name] = np.maximum(before, values)  # NaN stays NaN
            else:
                name = output.removeprefix(COUNTS)
                if self._is_used(name):
                    counts = values.astype(np.int64)
                    self._counts[name] = self._counts.get(name, np.zeros_like(counts)) + counts

    def _is_used(self, name: str) -> bool:
        in_block = component_of(name) == "cross_attention" and not name.endswith(("k_proj", "v_proj"))
        return self._cross_attends or not in_block


def _report_arrays(session: InferenceSession) -> dict[str, npt.NDArray[Any]]:
    """Allocate the arrays that receive the extra outputs of a session."""
    outputs = session.get_outputs()
    return {
        output.name: np.zeros(output.shape, np.float32)
        for output in outputs
        if output.name.startswith((CHANNELS, COUNTS))
    }


def _largest(name: str, channels: FloatArray) -> float:
    abs_max = float(channels.max())
    if not np.isfinite(abs_max):
        raise EngineError(f"calibration: the inputs of {name} are not finite; check the checkpoint's weights")
    return abs_max


def _linear_input(name: str, channels: FloatArray, counts: npt.NDArray[np.int64]) -> LinearInput:
    abs_max = _largest(name, channels)
    if abs_max == 0:
        raise EngineError(
            f"calibration: the inputs of {name} are all zero, so they have no scale; build its component with fp32"
        )
    # a scale needs fewer than 6 digits, and 6 keep the file small
    rounded = [float(f"{value:.6g}") for value in channels]
    return LinearInput(
        abs_max=max(rounded), clip=float(f"{min(int8_clip(counts, abs_max), max(rounded)):.6g}"), channels=rounded
    )
