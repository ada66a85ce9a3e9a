"""Calibrates: an observing engine answers samples through the real pipeline, with tiling, prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_trt.backends.onnxruntime.observing import ObservingBackend
from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.engine import Engine
from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.evaluation.samples import Sample, digest_of, read_samples
from nvlm_trt.progress import Progress
from nvlm_trt.prompt.encoder import Message
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import ChatRequest, Pipeline
from nvlm_trt.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from nvlm_trt.evaluation.tinydocs import Split

_MAX_TOKENS = 16  # each token costs a run, and an answer adds few tokens to its prompt's


def calibrate(engine_dir: Path, samples: Sequence[Sample], progress: Progress) -> Calibration:
    """Ask the samples of an engine of the recipe OBSERVING and return what it observed. The answers are not used.

    Raises RequestError for a sample that the engine cannot hold, ImageError for an image that does not decode, and
    EngineError for inputs of a layer that are not finite or all zero."""
    engine = Engine.open(engine_dir)
    digest = digest_of(samples, progress)
    backend = ObservingBackend(engine)
    with Pipeline(engine, backend, Tokenizer.from_directory(engine_dir)) as pipeline:
        for done, sample in enumerate(samples):
            progress("calibrating", done, len(samples))
            request = ChatRequest(
                [Message("user", sample.prompt)], tuple(sample.images), SamplingParams(max_tokens=_MAX_TOKENS)
            )
            try:
                for _ in pipeline.generate(request):
                    pass
            except (RequestError, ImageError) as error:
                raise type(error)(f"calibration sample {sample.name}: {error}") from None
    progress("calibrating", len(samples), len(samples))
    return Calibration(
        checkpoint_digest=engine.manifest.checkpoint_digest,
        samples={"count": len(samples), "digest": digest},
        linears=backend.linears(),
    )


def document_samples(split: Split, count: int, progress: Progress) -> list[Sample]:
    """Draw `count` samples of the built-in document tasks, spread evenly over the tasks."""
    from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS, generate

    tasks = (*TASKS, *TEXT_TASKS)
    samples: list[Sample] = []
    for i, task in enumerate(tasks):
        share = count * (i + 1) // len(tasks) - count * i // len(tasks)
        for sample in generate(split, [task], share):
            samples.append(sample)
            progress(f"drawing {split} samples", len(samples), count)
    return samples


def read_first_samples(path: Path, count: int | None) -> list[Sample]:
    """Read the first `count` samples of a JSONL file, or all. Raises RequestError naming the line that is no sample."""
    return list(islice(read_samples(path), count))
