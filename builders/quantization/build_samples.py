"""Provides the samples that a build asks: from the built-in document tasks or from a file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_trt.evaluation.samples import Sample, read_samples
from nvlm_trt.progress import Progress

if TYPE_CHECKING:
    from nvlm_trt.evaluation.tinydocs import Split


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
    """Read the first `count` samples of a JSONL file (None: all). Raises RequestError for a faulty line."""
    return list(islice(read_samples(path), count))
