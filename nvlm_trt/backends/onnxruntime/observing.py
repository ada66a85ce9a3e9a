"""Measures a calibration with the whole model in memory: an engine whose graphs report the inputs of linear layers.

`nvlm_trt.backends.onnxruntime.layer_parts` runs the same graphs cut into layers, for models that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import BackendArray, FloatArray, IntArray, RangeArray, stages_of
from nvlm_trt.backends.onnxruntime.backend import OnnxRuntimeBackend
from nvlm_trt.backends.onnxruntime.session import InferenceSession, IOBinding
from nvlm_trt.builders.quantization.build_samples import rounds_of
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.observations import Observations, images_are_read
from nvlm_trt.builders.quantization.observer import CHANNELS, COUNTS
from nvlm_trt.builders.quantization.reading import Reading, SampleReader, Tiles
from nvlm_trt.builders.quantization.scale_watch import BLOCK, ScaleWatch
from nvlm_trt.engine import Engine
from nvlm_trt.evaluation.samples import Sample, digest_of
from nvlm_trt.image.tiling import normalise_tiles
from nvlm_trt.progress import Progress


def observe(engine_dir: Path, samples: Sequence[Sample], progress: Progress) -> Calibration:
    """Let an engine of the recipe OBSERVING read the samples, and measure the inputs of its linear layers.

    Stops before the last sample if the scales do not move any more (`ScaleWatch`). Raises RequestError for a sample
    that the engine cannot hold, ImageError for an image that does not decode, and EngineError for inputs that are not
    finite or all zero."""
    engine = Engine.open(engine_dir)
    digest = digest_of(samples, progress)
    order = list(chain.from_iterable(rounds_of(samples)))
    watch = ScaleWatch()
    done = 0
    progress("calibrating", 0, len(order))
    with (
        ObservingBackend(engine) as backend,
        SampleReader(engine.config, engine.limits, engine_dir) as reader,
    ):
        while done < len(order):
            for sample in order[done : done + BLOCK]:
                backend.read(*reader.read(sample))
                done += 1
                progress("calibrating", done, len(order))
            if watch.are_still(backend.observations.scales()):
                break
        linears = backend.observations.linears()
    progress("calibrating", done, done)
    return Calibration(
        checkpoint_digest=engine.manifest.checkpoint_digest,
        samples={"count": done, "of": len(order), "digest": digest},
        linears=linears,
    )


class ObservingBackend(OnnxRuntimeBackend):
    """Runs an engine whose linear layers have the format Observer, one sample at a time, and adds up their reports."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, stages_of(engine.config), threads=None)
        self.observations = Observations()
        self._reports = {component: _report_arrays(session) for component, session in self._sessions.items()}
        self._images_are_read = False

    def read(self, reading: Reading, images: Sequence[Tiles]) -> None:
        """Run one sample. `images`: the RGB tiles [tiles, 3, E, E] of each."""
        features = [self.features(self.encode(normalise_tiles(tiles))) for tiles in images]
        cross_tokens = 0
        for of_image in features:
            self.write_cross_kv(0, cross_tokens, of_image)
            cross_tokens += of_image.cross_tokens
        before = np.cumsum(reading.input_ids == self.config.image_token_id)  # placeholders up to each token
        for chunk in reading.chunks():
            first, last = (int(before[token - 1]) if token else 0 for token in (chunk.start, chunk.stop))
            tokens = slice(chunk.start, chunk.stop)
            self._step(
                0,
                reading.input_ids[None, tokens],
                np.array([chunk.start]),
                self.embeddings(features, first, last),
                reading.cross_ranges[None, tokens],
                chunk.stop - chunk.start - chunk.rows,
            )

    def _run_cross_kv(self, image_tokens: FloatArray) -> list[FloatArray]:
        names = [output.name for output in self._session("cross_kv").get_outputs()]
        outputs = dict(zip(names, super()._run_cross_kv(image_tokens), strict=True))
        self.observations.add_reports({name: outputs.pop(name) for name in self._reports["cross_kv"]})
        return list(outputs.values())

    def _step(
        self,
        first_slot: int,
        input_ids: IntArray,
        positions: IntArray,
        embeddings: BackendArray,
        cross_ranges: RangeArray,
        first_wanted: int = 0,
    ) -> FloatArray:
        self._images_are_read = images_are_read(cross_ranges)
        return super()._step(first_slot, input_ids, positions, embeddings, cross_ranges, first_wanted)

    def _run(self, component: str, binding: IOBinding) -> None:
        reports = self._reports[component]
        for name, array in reports.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        super()._run(component, binding)
        self.observations.add_reports(reports, self._images_are_read)


def _report_arrays(session: InferenceSession) -> dict[str, npt.NDArray[Any]]:
    """Allocate the arrays that receive the extra outputs of a session."""
    outputs = session.get_outputs()
    return {
        output.name: np.zeros(output.shape, np.float32)
        for output in outputs
        if output.name.startswith((CHANNELS, COUNTS))
    }
