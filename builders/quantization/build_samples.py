"""Provides the samples that a build asks: from the built-in document tasks or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from random import Random
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


def rounds_of(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Put samples into rounds of one sample of each task, so that the first rounds stand for all.

    Shuffles the samples of a task, alike in every build: a file may be sorted. The last rounds lack the tasks that have
    fewer samples. A task with samples of both kinds, with images and without, counts as two, as in a score."""
    tasks: dict[tuple[bool, str], list[Sample]] = {}
    for sample in samples:
        tasks.setdefault((bool(sample.images), sample.task), []).append(sample)
    random = Random(0)
    for of_task in tasks.values():
        random.shuffle(of_task)
    return [[sample for sample in each if sample is not None] for each in zip_longest(*tasks.values())]
