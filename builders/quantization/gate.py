"""Publishes a quantised engine only if it answers as well as the unquantised engine: the accuracy gate.

Both engines answer the same questions, part by part, until all are asked or the verdict is beyond doubt
(`early_verdict`). They share the image tokens of one vision encoder, unless the build quantises it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from nvlm_trt.builders.quantization.build_samples import document_samples, read_first_samples, rounds_of
from nvlm_trt.builders.quantization.early_verdict import is_decided, looks
from nvlm_trt.builders.quantization.encoded_images import EncodedImages
from nvlm_trt.builders.quantization.examination import Examination
from nvlm_trt.errors import EngineError
from nvlm_trt.evaluation.accuracy import agreement
from nvlm_trt.evaluation.samples import digest_of
from nvlm_trt.model.precision import quantised_components
from nvlm_trt.progress import Progress
from nvlm_trt.staging import temporary_sibling

# The gate does not judge an engine if the unquantised engine scores less: random weights score 0.
MEANINGFUL_SCORE = 0.1
DOCUMENT_SAMPLES = 500  # about 40 of each task
NOT_MEASURED = {"result": "not measured"}
_ROUNDING = 1e-9  # points

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


class AccuracyGate:
    """Compares the quantised engine of a build with temporary engines, which `write` makes."""

    def __init__(
        self,
        options: GateOptions,
        write: WriteEngine,
        beside: Path,
        progress: Progress,
        unquantised: str,
        floating: Mapping[str, str],
    ) -> None:
        """Read or draw the samples. `unquantised` names the precision of the unquantised engine, `floating` says it
        for each component. Raises RequestError and ImageError for faulty samples."""
        if options.samples:
            samples = read_first_samples(options.samples, options.count)
        else:
            samples = document_samples("validation", options.count or DOCUMENT_SAMPLES, progress)
        self._digest = digest_of(samples, progress)
        rounds = rounds_of(samples)
        self._samples = list(chain.from_iterable(rounds))
        self._looks = looks(rounds)
        self._max_drop = options.max_drop
        self._write = write
        self.floating = floating
        self._unquantised = unquantised
        self._beside = beside
        self._progress = progress

    def check(self, engine_dir: Path, precisions: Mapping[str, str]) -> dict[str, Any]:
        """Measure both engines and return the record for the manifest. Raises AccuracyError for too large a loss."""
        with temporary_sibling(self._beside) as tokens_dir:
            with temporary_sibling(self._beside) as reference_dir:
                self._write(self.floating, reference_dir)
                images = EncodedImages(reference_dir, tokens_dir)
                reference = self._examination(self._unquantised, reference_dir, images)
                quantised = self._examination("quantised", engine_dir, self._shared(images, precisions))
                asked = self._ask_until_decided(reference, quantised)
            record = self._record(reference, quantised, asked)
            drop = _points(reference, quantised)
            if reference.score < MEANINGFUL_SCORE:
                return {"result": "meaningless", **record}
            if drop <= self._max_drop + _ROUNDING:
                return {"result": "passed", **record}
            # the unquantised engine has left the disk, which need not hold three engines at once
            costs = self._costs(reference, quantised, precisions, images if images.complete else None, asked)
        worst = max(costs, key=lambda cost: cost.drop)
        raise AccuracyError(
            f"accuracy gate: {100 * quantised.score:.2f} points against {100 * reference.score:.2f} in "
            f"{self._unquantised}, a loss of {drop:.2f} where {self._max_drop:g} is allowed, on {asked} samples; "
            f"{worst.component} costs most ({worst.drop:.2f} in {worst.precision}): build with --precision ...,"
            f"{worst.component}={self.floating[worst.component]}, or raise --max-accuracy-drop",
            costs,
        )

    def _ask_until_decided(self, reference: Examination, quantised: Examination) -> int:
        """Return the number of samples that both engines have answered."""
        for count in self._looks:
            reference.ask(count)
            quantised.ask(count)
            allowed = (self._max_drop + _ROUNDING) / 100
            if is_decided(reference.scores(), quantised.scores(), allowed, MEANINGFUL_SCORE):
                break
        for examination in (reference, quantised):
            examination.end()
        return count

    def _record(self, reference: Examination, quantised: Examination, asked: int) -> dict[str, Any]:
        same = agreement(reference.answers, quantised.answers)
        return {
            "samples": {"count": asked, "of": len(self._samples), "digest": self._digest},
            "unquantised": self._unquantised,
            "fp32_score": reference.score,  # the unquantised engine's score, also in another type than fp32
            "score": quantised.score,
            "tasks": {
                task.task: {"fp32_score": task.score, "score": after.score}
                for task, after in zip(reference.summary().tasks, quantised.summary().tasks, strict=True)
            },
            "max_drop_points": self._max_drop,
            "equal_answers": same.equal / same.total,
        }

    def _costs(
        self,
        reference: Examination,
        quantised: Examination,
        precisions: Mapping[str, str],
        images: EncodedImages | None,
        asked: int,
    ) -> list[ComponentCost]:
        """Measure each quantised component alone."""
        components = quantised_components(precisions)
        costs = []
        for component in components:
            alone = {**self.floating, component: precisions[component]}
            # `check` has already measured an engine whose only quantised component is this one
            answers = quantised if len(components) == 1 else self._measured(component, alone, images, asked)
            costs.append(ComponentCost(component, precisions[component], answers.score, _points(reference, answers)))
        return costs

    def _measured(
        self, what: str, precisions: Mapping[str, str], images: EncodedImages | None, asked: int
    ) -> Examination:
        with temporary_sibling(self._beside) as directory:
            self._write(precisions, directory)
            examination = self._examination(what, directory, self._shared(images, precisions))
            examination.ask(asked)
            examination.end()
        return examination

    def _examination(self, what: str, engine_dir: Path, images: EncodedImages | None) -> Examination:
        return Examination(what, engine_dir, self._samples, self._digest, images, self._progress)

    def _shared(self, images: EncodedImages | None, precisions: Mapping[str, str]) -> EncodedImages | None:
        """Return `images` if an engine of these precisions has the vision encoder of the unquantised engine."""
        same = (precisions[component] == self.floating[component] for component in ("vision_encoder", "projector"))
        return images if all(same) else None


def _points(reference: Examination, other: Examination) -> float:
    return 100 * (reference.score - other.score)
