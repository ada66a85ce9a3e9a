"""Defines the steps of a build in which backends differ: each backend implements `BuildSteps`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nvlm_trt.builders.quantization.calibration import Calibration
from nvlm_trt.builders.quantization.calibration_memory import CalibrateBy, calibrates_by
from nvlm_trt.builders.quantization.formats import Recipe, WeightForm
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.builders.unfinished_build import UnfinishedBuild
from nvlm_trt.evaluation.samples import Sample
from nvlm_trt.progress import Progress

Precisions = Mapping[str, str]  # component -> precision


@dataclass(frozen=True)
class BuildJob:
    """Holds what a backend needs to know about a build."""

    source: EngineSource
    options: Mapping[str, Any]  # options that only this backend has
    output: Path  # where the engine will be
    staging: Path  # directory of the engine until then; temporary engines are its siblings
    progress: Progress
    unfinished: UnfinishedBuild | None = None  # holds `staging` and remembers what is finished
    calibrate_by: CalibrateBy | None = None  # as the user asks; None: by the memory of this machine

    @functools.cached_property
    def calibrates_by(self) -> CalibrateBy:
        """Decide once per build what a calibration has in memory."""
        return self.calibrate_by or calibrates_by(self.source, self.output)

    def unfinished_in(self, directory: Path) -> UnfinishedBuild | None:
        """Return what remembers the files of a directory: None for those of a temporary engine."""
        return self.unfinished if directory == self.staging else None


class BuildSteps(Protocol):
    """Lists the steps of a build that each backend implements."""

    tools: Sequence[str]  # packages whose versions the manifest lists
    weight_form: WeightForm
    # writes the engines that are tried and judged where this machine cannot run the engine itself; None: it can
    trial: BuildSteps | None

    def unquantised(self, precisions: Precisions) -> str:
        """Name the precision, of the backend's table, of the unquantised engine that a quantised one is compared
        with."""
        ...

    def write_stages(self, directory: Path, recipe: Recipe) -> dict[str, Any] | None:
        """Write the files of all stages. Return the backend's record in the manifest."""
        ...

    def calibrate(self, samples: Sequence[Sample]) -> Calibration:
        """Measure the inputs of the checkpoint's linear layers."""
        ...
