"""Measures the accuracy of a model on a set of samples: asks the open questions, scores, summarises by task."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nvlm_trt.errors import NvlmError
from nvlm_trt.evaluation.answerers import Answerer
from nvlm_trt.evaluation.intervals import mean_interval, wilson_interval
from nvlm_trt.evaluation.results import SCHEMA_VERSION, Header, ResultsFile
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.evaluation.scoring import score
from nvlm_trt.progress import Progress, no_progress

Kind = Literal["image", "text"]


@dataclass(frozen=True)
class EvalOptions:
    """Holds the options that decide an answer or its score, besides model and sample."""

    max_tokens: int = 32
    tolerance: float = 0.0  # for the metric numeric


@dataclass(frozen=True)
class TaskScore:
    """Holds the mean score of one task's samples with its 95 % interval."""

    kind: Kind
    task: str
    metric: str
    count: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class GroupScore:
    """Holds the mean score of several tasks with its 95 % interval. Each task counts the same."""

    tasks: int
    count: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Separates text-only tasks (how much of its LLM a model has kept) from image tasks (how well the model sees)."""

    tasks: tuple[TaskScore, ...]  # tasks with images first

    def group(self, kind: Kind | None = None) -> GroupScore | None:
        """Averages the tasks of one kind, or all tasks; None if there are none."""
        tasks = [task for task in self.tasks if kind in (None, task.kind)]
        if not tasks:
            return None
        low, high = mean_interval([(task.score, (task.low, task.high)) for task in tasks])
        mean = math.fsum(task.score for task in tasks) / len(tasks)
        return GroupScore(len(tasks), sum(task.count for task in tasks), mean, low, high)

    @property
    def overall(self) -> GroupScore:
        overall = self.group()
        assert overall is not None, "a set has at least one sample"
        return overall

    def to_dict(self) -> dict[str, Any]:
        image, text = self.group("image"), self.group("text")
        return {
            "tasks": [asdict(task) for task in self.tasks],
            "image": asdict(image) if image else None,
            "text": asdict(text) if text else None,
            "overall": asdict(self.overall),
        }


@dataclass(frozen=True)
class Agreement:
    """Compares two runs over the same samples, answer by answer."""

    equal: int
    total: int
    differing: tuple[str, ...]  # names of samples


def run_header(digest: str, count: int, answerer: Answerer, options: EvalOptions) -> Header:
    """Identifies a run by samples, model and options; two runs with the same header give the same results."""
    return {
        "schema_version": SCHEMA_VERSION,
        "samples": {"count": count, "digest": digest},
        "model": answerer.identity.to_dict(),
        "options": asdict(options),
    }


def evaluate(
    samples: Sequence[Sample],
    answerer: Answerer,
    results: ResultsFile,
    options: EvalOptions,
    progress: Progress = no_progress,
    resumable: bool = True,
) -> Summary:
    """Asks the samples that `results` has no answer to, then summarises. Adds each answer to `results` at once.

    Does not load the model if every sample has an answer. Raises the answerer's errors; those of a `resumable` run say
    what is kept.
    """
    remaining = [sample for sample in samples if sample.name not in results.answers]
    if remaining:
        progress("answering", len(results.answers), len(samples))
        try:
            with answerer, contextlib.closing(answerer.answers(remaining)) as answers:  # type: ignore[type-var]
                for sample, text in answers:
                    results.add(sample.name, text, _score(sample, text, options))
                    progress("answering", len(results.answers), len(samples))
        except NvlmError as error:
            if not resumable:
                raise
            raise type(error)(f"{error} ({kept(results, len(samples))})") from error
    return summarise(samples, results.answers, options)


def summarise(samples: Sequence[Sample], answers: Mapping[str, str], options: EvalOptions) -> Summary:
    """Scores by task, in the order of the tasks' first samples; a task with samples of both kinds has two rows."""
    scores: dict[tuple[Kind, str], list[float]] = {}
    metrics: dict[tuple[Kind, str], dict[str, None]] = {}
    for sample in samples:
        key: tuple[Kind, str] = ("image" if sample.images else "text", sample.task)
        scores.setdefault(key, []).append(_score(sample, answers[sample.name], options))
        metrics.setdefault(key, {})[sample.metric] = None
    tasks = []
    for (kind, task), values in sorted(scores.items(), key=lambda item: item[0][0]):  # stable: "image" < "text"
        mean = math.fsum(values) / len(values)
        metric = ", ".join(metrics[kind, task])
        tasks.append(TaskScore(kind, task, metric, len(values), mean, *wilson_interval(mean, len(values))))
    return Summary(tuple(tasks))


def document(samples: Sequence[Sample], results: ResultsFile, summary: Summary, options: EvalOptions) -> dict[str, Any]:
    """Returns the results as one JSON object."""
    answers = [
        {
            "name": sample.name,
            "task": sample.task,
            "answer": results.answers[sample.name],
            "expected": sample.answer,
            "score": _score(sample, results.answers[sample.name], options),
        }
        for sample in samples
    ]
    return results.header | {"summary": summary.to_dict(), "answers": answers}


def agreement(a: Mapping[str, str], b: Mapping[str, str]) -> Agreement:
    """Compares answers by sample name, character by character; a sample that only one run has is a difference."""
    names = list(dict.fromkeys([*a, *b]))
    differing = tuple(name for name in names if name not in a or name not in b or a[name] != b[name])
    return Agreement(len(names) - len(differing), len(names), differing)


def kept(results: ResultsFile, total: int) -> str:
    """Says how many answers an interrupted run keeps, and what to do."""
    if results.partial is None:
        return "nothing is kept; with --output FILE.json the same command goes on where it stopped"
    return f"{len(results.answers)} of {total} answers are kept in {results.partial}; run the same command to go on"


def _score(sample: Sample, answer: str, options: EvalOptions) -> float:
    return score(sample.metric, answer, sample.answer, options.tolerance)
