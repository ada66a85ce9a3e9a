"""Asks one engine the questions of the accuracy gate, some at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nvlm_trt.builders.quantization.encoded_images import EncodedImages
from nvlm_trt.errors import EngineError, NotFiniteError
from nvlm_trt.evaluation.accuracy import EvalOptions, Summary, evaluate, run_header, summarise
from nvlm_trt.evaluation.answerers import EngineAnswerer
from nvlm_trt.evaluation.results import ResultsFile
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.evaluation.scoring import score
from nvlm_trt.progress import Progress

_OPTIONS = EvalOptions()


class Examination:
    """Keeps the answers of one engine to the first questions of the gate."""

    def __init__(
        self,
        what: str,
        engine_dir: Path,
        samples: Sequence[Sample],
        digest: str,
        images: EncodedImages | None,
        progress: Progress,
    ) -> None:
        """`what` names the engine in progress and errors. `images`: None for the engine's own vision encoder."""
        self.what = what
        self._samples = samples
        self._images = images
        self._progress = progress
        encode_tiles = images.encode if images else None
        self._answerer = EngineAnswerer(engine_dir, _OPTIONS.max_tokens, encode_tiles=encode_tiles)
        header = run_header(digest, len(samples), self._answerer, _OPTIONS)
        self._results = ResultsFile(None, header, [sample.name for sample in samples])

    def ask(self, count: int) -> None:
        """Ask those of the first `count` samples that were not asked before. Opens engine and images for that time.

        Raises EngineError for logits that are not finite."""

        def progress(description: str, done: float, total: float) -> None:
            self._report(done, len(self._samples))

        try:
            with self._results, self._images or nullcontext():
                evaluate(self._samples[:count], self._answerer, self._results, _OPTIONS, progress, resumable=False)
        except NotFiniteError:
            raise EngineError(
                f"accuracy gate ({self.what}): the engine computes logits that are not finite; check the checkpoint's "
                "weights, or choose another --precision"
            ) from None

    def end(self) -> None:
        """Report that no more samples will be asked."""
        self._report(len(self.answers), len(self.answers))

    @property
    def answers(self) -> Mapping[str, str]:
        return self._results.answers

    def _report(self, done: float, total: float) -> None:
        self._progress(f"accuracy gate: {self.what} answering", done, total)

    @property
    def _asked(self) -> list[Sample]:
        return [sample for sample in self._samples if sample.name in self.answers]

    def summary(self) -> Summary:
        return summarise(self._asked, self.answers, _OPTIONS)

    @property
    def score(self) -> float:
        """Return the mean over the tasks, 0..1."""
        return self.summary().overall.score

    def scores(self) -> npt.NDArray[np.float64]:
        """Return the scores [asked] of the single answers, 0..1, in the order of the samples."""
        return np.array(
            [score(each.metric, self.answers[each.name], each.answer, _OPTIONS.tolerance) for each in self._asked]
        )
