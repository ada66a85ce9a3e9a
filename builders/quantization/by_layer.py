"""Calibrates a model one layer at a time: each is loaded once and run over all samples, then the next one.

Memory holds one layer and one sample. The activations between two layers are in files, so a calibration that was killed
goes on with the block of samples at which it was stopped. A runtime runs the layers (`PartRuntime`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np

from nvlm_trt.backends.base import FloatArray, RangeArray
from nvlm_trt.builders.quantization.build_samples import rounds_of
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.observations import Observations
from nvlm_trt.builders.quantization.part_store import PartStore
from nvlm_trt.builders.quantization.reading import ANSWER_TOKENS, CHUNK, Reading, SampleReader
from nvlm_trt.builders.quantization.scale_watch import BLOCK, ScaleWatch
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.evaluation.samples import Sample, digest_of
from nvlm_trt.image.tiling import normalise_tiles
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.layout import EMBEDDING
from nvlm_trt.progress import Progress
from nvlm_trt.prompt.image_tokens import split_tiles

# the kinds of parts
PATCHES: Final = "patches"
VISION_LAYER: Final = "vision-layer"
PROJECTOR: Final = "projector"
DECODER_LAYER: Final = "decoder-layer"
HEAD: Final = "head"
_VISION = (PATCHES, VISION_LAYER, PROJECTOR)


@dataclass(frozen=True)
class Part:
    """Names the weights that are in memory together. A decoder layer includes the gated block before it."""

    kind: Literal["patches", "vision-layer", "projector", "decoder-layer", "head"]
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}-{self.index}"


class OpenPart(Protocol):
    """Runs one part, and reports what its linear layers get."""

    def observed(self) -> Observations:
        """Return what was observed since the last call."""
        ...


class VisionPart(OpenPart, Protocol):
    """A part of the vision encoder or the projector."""

    def encode(self, x: FloatArray) -> FloatArray:
        """Run the part on all tiles of one image: [tiles, ...] -> [tiles, ...]."""
        ...


class LlmPart(OpenPart, Protocol):
    """A layer of the LLM, with the gated block before it, or the head."""

    def read_images(self, images: Sequence[FloatArray]) -> None:
        """Take the cross-attended image tokens [tiles, T, hidden] of each image of the next sample."""
        ...

    def step(self, x: FloatArray, position: int, cross_ranges: RangeArray) -> FloatArray:
        """Run the part on tokens [S, hidden] of one sample, which follow `position` others; cross_ranges [S, 2]."""
        ...


class PartRuntime(Protocol):
    """Loads parts of one checkpoint, each for as long as a context lasts. `folder`: empty, and lasts as long."""

    @property
    def name(self) -> str:
        """Name the runtime with its version: another one gives other bits."""
        ...

    def open_vision(self, part: Part, folder: Path) -> AbstractContextManager[VisionPart]: ...

    def open_llm(self, part: Part, folder: Path) -> AbstractContextManager[LlmPart]: ...


def parts_of(config: NvlmConfig) -> list[Part]:
    """List the parts of a model in the order in which they run."""
    vision = [Part(PATCHES), *(Part(VISION_LAYER, i) for i in range(config.vision.num_layers)), Part(PROJECTOR)]
    return [*vision, *(Part(DECODER_LAYER, i) for i in range(config.llm.num_layers)), Part(HEAD)]


def calibrate_by_layer(
    source: EngineSource, samples: Sequence[Sample], folder: Path, runtime: PartRuntime, progress: Progress
) -> Calibration:
    """Measure the inputs of the linear layers, with the results in `folder` until its owner removes it.

    The scales are bit for bit those of the whole model if the same runtime runs it, and the calibration uses as many
    samples. Raises RequestError, ImageError and EngineError as a calibration of the whole model does, and EngineError
    for a folder that another process uses."""
    digest = digest_of(samples, progress)
    order = list(chain.from_iterable(rounds_of(samples)))
    what = {
        "checkpoint": source.digest,
        "samples": digest,
        "limits": source.limits.model_dump(exclude={"max_slots"}),
        "runtime": runtime.name,
        "read": [BLOCK, CHUNK, ANSWER_TOKENS],
    }
    with PartStore(folder, what) as store:
        if (finished := store.result()) is not None:
            return finished
        with SampleReader(source.config, source.limits, source.checkpoint_dir) as reader:
            return _ByLayer(source, order, reader, store, runtime, progress).run({"of": len(order), "digest": digest})


class _ByLayer:
    """One calibration: every part over every block of samples."""

    def __init__(
        self,
        source: EngineSource,
        samples: Sequence[Sample],
        reader: SampleReader,
        store: PartStore,
        runtime: PartRuntime,
        progress: Progress,
    ) -> None:
        self._source, self._config = source, source.config
        self._samples, self._reader = samples, reader
        self._readings = [reader.read(sample)[0] for sample in samples]
        self._store, self._runtime, self._progress = store, runtime, progress
        self._blocks = range(-(-len(samples) // BLOCK))
        self._parts = parts_of(self._config)

    def run(self, record: Mapping[str, Any]) -> Calibration:
        for before, part in pairwise([None, *self._parts]):
            assert part is not None
            self._run_part(part, before)
        observations, used = self._observations_in_use()
        calibration = Calibration(
            checkpoint_digest=self._source.digest, samples={"count": used, **record}, linears=observations.linears()
        )
        self._store.finish(calibration)
        return calibration

    def _observations_in_use(self) -> tuple[Observations, int]:
        """Add up the blocks of samples until the scales are still, as a calibration of the whole model does, which
        would not have read the rest. Return how many samples these are, too."""
        total, watch = Observations(), ScaleWatch()
        for block in self._blocks:
            for part in self._parts:
                total.merge(self._store.observations(str(part), block))
            if watch.are_still(total.scales()):
                break
        return total, min((block + 1) * BLOCK, len(self._samples))

    # --- one part ----------------------------------------------------------------------------------------------------

    def _run_part(self, part: Part, before: Part | None) -> None:
        """Run a part over the blocks of samples that it has not run over yet. `before`: the part that feeds it."""
        unmeasured = [block for block in self._blocks if not self._store.is_measured(str(part), block)]
        if not unmeasured:
            self._report(part, self._blocks[-1])
            return
        with contextlib.ExitStack() as stack:
            opened, run = self._opened(part, before, stack)
            for block in unmeasured:
                with self._store.new_activations(str(part), block) as file:
                    for given in run(block):
                        file.write(np.ascontiguousarray(given).data)
                observations = opened.observed()
                observations.check_finite()
                self._store.add(str(part), block, observations)
                # gated blocks read the image tokens again
                if before is not None and not (before.kind == PROJECTOR and self._config.cross_layers):
                    self._store.drop(str(before), block)
                self._report(part, block)

    def _opened(
        self, part: Part, before: Part | None, stack: contextlib.ExitStack
    ) -> tuple[OpenPart, Callable[[int], Iterator[FloatArray]]]:
        """Open a part, and return it with the function that runs it over a block of samples."""
        folder = stack.enter_context(self._store.scratch())
        if part.kind in _VISION:
            of_vision = stack.enter_context(self._runtime.open_vision(part, folder))
            return of_vision, partial(self._encode, of_vision, before)
        assert before is not None, "the language model stands behind the vision encoder"
        of_llm = stack.enter_context(self._runtime.open_llm(part, folder))
        return of_llm, partial(self._read, of_llm, part, before)

    def _encode(self, opened: VisionPart, before: Part | None, block: int) -> Iterator[FloatArray]:
        """Run a part of the vision encoder on the images of a block, one after the other."""
        if before is None:
            for sample in self._samples[_of(block)]:
                for tiles in self._reader.images(sample):
                    yield opened.encode(normalise_tiles(tiles))
            return
        with self._store.activations(str(before), block) as activations:
            for reading in self._readings[_of(block)]:
                for count in reading.tiles:
                    yield opened.encode(activations.next((count, *self._patches)))

    def _read(self, opened: LlmPart, part: Part, before: Part, block: int) -> Iterator[FloatArray]:
        """Run a part of the language model on the samples of a block, one after the other."""
        for reading, x, images in self._tokens(part, before, block):
            opened.read_images(images)
            for chunk in reading.chunks():
                tokens = slice(chunk.stop - chunk.rows if part.kind == HEAD else chunk.start, chunk.stop)
                yield opened.step(x[tokens], tokens.start, reading.cross_ranges[tokens])

    def _tokens(
        self, part: Part, before: Part, block: int
    ) -> Iterator[tuple[Reading, FloatArray, Sequence[FloatArray]]]:
        """Yield the samples of a block: the reading, its tokens [S, hidden], and the cross-attended image tokens
        [tiles, T, hidden] of each image, if the part has a gated block."""
        config, hidden = self._config, self._config.llm.hidden_size
        is_first, crosses = before.kind == PROJECTOR, part.kind == DECODER_LAYER and part.index in config.cross_layers
        with contextlib.ExitStack() as opened:
            tokens_of_images = tokens_before = None
            if is_first or crosses:
                tokens_of_images = opened.enter_context(self._store.activations(str(Part(PROJECTOR)), block))
            if is_first:
                checkpoint = opened.enter_context(self._source.open_checkpoint())
            else:
                tokens_before = opened.enter_context(self._store.activations(str(before), block))
            for reading in self._readings[_of(block)]:
                images = []
                if tokens_of_images is not None:
                    shapes = ((tiles, config.tokens_per_tile, hidden) for tiles in reading.tiles)
                    images = [tokens_of_images.next(shape) for shape in shapes]
                if tokens_before is not None:
                    x = tokens_before.next((len(reading.input_ids), hidden))
                else:
                    x = _embedded(config, checkpoint, reading, images)
                crossed = [tokens[split_tiles(config.architecture, len(tokens))[1]] for tokens in images if crosses]
                yield reading, x, [tokens for tokens in crossed if len(tokens)]

    @property
    def _patches(self) -> tuple[int, int]:
        """Return the shape of a tile in the vision encoder."""
        return self._config.vision.grid**2 + 1, self._config.vision.hidden_size

    def _report(self, part: Part, block: int) -> None:
        """Report that a part has run over a block. Bars count parts times blocks, apart for the two models: a layer of
        the one takes another time than a layer of the other."""
        of_vision = part.kind in _VISION
        parts = [other for other in self._parts if (other.kind in _VISION) == of_vision]
        done = parts.index(part) * len(self._blocks) + block + 1
        what = "calibrating the vision encoder" if of_vision else "calibrating the language model"
        self._progress(what, done, len(parts) * len(self._blocks))


def _embedded(config: NvlmConfig, checkpoint: Checkpoint, reading: Reading, images: Sequence[FloatArray]) -> FloatArray:
    """Return the embeddings [S, hidden] of a sample, image embeddings in place of the placeholders. `images`: the image
    tokens [tiles, T, hidden] of each."""
    x = checkpoint.rows(EMBEDDING, reading.input_ids)
    in_llm = [tokens[split_tiles(config.architecture, len(tokens))[0]] for tokens in images]
    if in_llm:
        x[reading.input_ids == config.image_token_id] = np.concatenate(in_llm).reshape(-1, config.llm.hidden_size)
    return x


def _of(block: int) -> slice:
    """Return which samples are in a block."""
    return slice(block * BLOCK, (block + 1) * BLOCK)
