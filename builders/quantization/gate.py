"""Publishes a quantised engine only if it answers as well as the unquantised engine: the accuracy gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_trt.builders.quantization.build_samples import document_samples, read_first_samples
from nvlm_trt.errors import EngineError, NotFiniteError
from nvlm_trt.evaluation.accuracy import EvalOptions, Summary, agreement, evaluate, run_header
from nvlm_trt.evaluation.answerers import EngineAnswerer
from nvlm_trt.evaluation.results import ResultsFile
from nvlm_trt.evaluation.samples import digest_of
from nvlm_trt.model.precision import COMPONENTS, quantised_components
from nvlm_trt.progress import Progress
from nvlm_trt.staging import temporary_sibling

# The gate does not judge an engine if the unquantised engine scores less: random weights score 0.
MEANINGFUL_SCORE = 0.1
DOCUMENT_SAMPLES = 500  # about 40 of each task
NOT_MEASURED = {"result": "not measured"}

# Writes an engine of the gate's checkpoint into an empty directory: (component -> precision, directory).
WriteEngine = Callable[[Mapping[str, str], Path], object]


@dataclass(frozen=True)
class GateOptions:
    """Chooses the samples of the gate and the loss that the gate allows."""

    samples: Path | None = None  # JSONL; None: the built-in document tasks, split validation
    count: int | None = None  # samples in all; None: all of a file, DOCUMENT_SAMPLES of the document tasks
    max_drop: float = 1.0  # points, of 100

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 100:
            raise EngineError(f"--max-accuracy-drop {self.max_drop} is not from 0 to 100 points; the default is 1")


@dataclass(frozen=True)
class ComponentCost:
    """Holds the accuracy that quantising one component alone costs."""

    component: str
    precision: str
    score: float
    drop: float  # points

    def __str__(self) -> str:
        change = 0.0 - round(self.drop, 2)  # never -0.0
        return f"{self.component:16} {self.precision:18} {100 * self.score:6.2f}  {change:+.2f} points"


class AccuracyError(EngineError):
    """A quantised engine answers too badly to be published. `costs` lists the loss from each component alone."""

    def __init__(self, message: str, costs: Sequence[ComponentCost]) -> None:
        super().__init__(message)
        self.costs = tuple(costs)


@dataclass(frozen=True)
class _Answers:
    summary: Summary
    texts: Mapping[str, str]

    @property
    def score(self) -> float:
        return self.summary.overall.score


class AccuracyGate:
    """Compares the quantised engine of a build with temporary engines, which `write` makes."""

    def __init__(
        self, options: GateOptions, write: WriteEngine, beside: Path, progress: Progress, unquantised: str = "fp32"
    ) -> None:
        """Read or draw the samples. `unquantised` is the floating-point type of the engine's unquantised components,
        and of all components of the unquantised engine. Raises RequestError and ImageError for faulty samples."""
        if options.samples:
            self._samples = read_first_samples(options.samples, options.count)
        else:
            self._samples = document_samples("validation", options.count or DOCUMENT_SAMPLES, progress)
        self._digest = digest_of(self._samples, progress)
        self._max_drop = options.max_drop
        self._write = write
        self._unquantised = unquantised
        self._beside = beside
        self._progress = progress

    def check(self, engine_dir: Path, precisions: Mapping[str, str]) -> dict[str, Any]:
        """Measure both engines and return the record for the manifest. Raises AccuracyError for too large a loss."""
        reference = self._answers_of(self._unquantised, dict.fromkeys(COMPONENTS, self._unquantised))
        quantised = self._ask("quantised", engine_dir)
        drop = _points(reference, quantised)
        same = agreement(reference.texts, quantised.texts)
        record = {
            "samples": {"count": len(self._samples), "digest": self._digest},
            "unquantised": self._unquantised,
            "fp32_score": reference.score,  # the unquantised engine's score, also in another type than fp32
            "score": quantised.score,
            "tasks": {
                task.task: {"fp32_score": task.score, "score": after.score}
                for task, after in zip(reference.summary.tasks, quantised.summary.tasks, strict=True)
            },
            "max_drop_points": self._max_drop,
            "equal_answers": same.equal / same.total,
        }
        if reference.score < MEANINGFUL_SCORE:
            return {"result": "meaningless", **record}
        if drop <= self._max_drop + 1e-9:
            return {"result": "passed", **record}
        costs = self._costs(reference, quantised, precisions)
        worst = max(costs, key=lambda cost: cost.drop)
        raise AccuracyError(
            f"accuracy gate: {100 * quantised.score:.2f} points against {100 * reference.score:.2f} in "
            f"{self._unquantised}, a loss of {drop:.2f} where {self._max_drop:g} is allowed; {worst.component} costs "
            f"most ({worst.drop:.2f} in {worst.precision}): build with --precision ...,"
            f"{worst.component}={self._unquantised}, or raise --max-accuracy-drop",
            costs,
        )

    def _costs(self, reference: _Answers, quantised: _Answers, precisions: Mapping[str, str]) -> list[ComponentCost]:
        """Measure each quantised component alone."""
        components = quantised_components(precisions)
        costs = []
        for component in components:
            alone = dict.fromkeys(COMPONENTS, self._unquantised) | {component: precisions[component]}
            # `check` has already measured an engine whose only quantised component is this one
            answers = quantised if len(components) == 1 else self._answers_of(component, alone)
            costs.append(ComponentCost(component, precisions[component], answers.score, _points(reference, answers)))
        return costs

    def _answers_of(self, what: str, precisions: Mapping[str, str]) -> _Answers:
        with temporary_sibling(self._beside) as directory:
            self._write(precisions, directory)
            return self._ask(what, directory)

    def _ask(self, what: str, engine_dir: Path) -> _Answers:
        options = EvalOptions()
        answerer = EngineAnswerer(engine_dir, options.max_tokens)

        def progress(description: str, done: float, total: float) -> None:
            self._progress(f"accuracy gate: {what} {description}", done, total)

        header = run_header(self._digest, len(self._samples), answerer, options)
        with ResultsFile(None, header, [sample.name for sample in self._samples]) as results:
            try:
                summary = evaluate(self._samples, answerer, results, options, progress, resumable=False)
            except NotFiniteError:
                raise EngineError(
                    f"accuracy gate ({what}): the engine computes logits that are not finite; check the checkpoint's "
                    "weights, or choose another --precision"
                ) from None
        return _Answers(summary, results.answers)


def _points(reference: _Answers, other: _Answers) -> float:
    return 100 * (reference.score - other.score)
