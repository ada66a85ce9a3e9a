"""Keeps the graphs and the finished plans of an interrupted build for the build that goes on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvlm_trt.builders.build_steps import BuildJob
from nvlm_trt.staging import temporary_sibling


class UnfinishedPlans:
    """The plans of the engine in `directory`. Those of a temporary engine are all built anew."""

    def __init__(self, job: BuildJob, directory: Path) -> None:
        self.build = job.unfinished_in(directory)
        self._directory = directory

    @contextlib.contextmanager
    def graphs_folder(self) -> Iterator[Path]:
        """Yield a folder beside the engine for the graphs, which the plans make superfluous."""
        if self.build is None:
            with temporary_sibling(self._directory) as folder:
                yield folder
            return
        self.build.graphs.mkdir(exist_ok=True)
        yield self.build.graphs
        shutil.rmtree(self.build.graphs)

    def has(self, stage: str) -> bool:
        return self._words(stage) is not None

    def remembered(self, stage: str) -> Any:
        """Return what `finish` was given with a plan."""
        words = self._words(stage)
        assert words is not None, f"the plan of {stage} is finished"
        return json.loads(words)

    def finish(self, stage: str, remember: Any = None) -> None:
        """Note that a plan is written. `remember`: what the manifest will say about it, as JSON has it."""
        if self.build is not None:
            self.build.note_whole(self.plan(stage), json.dumps(remember, allow_nan=False))

    def plan(self, stage: str) -> Path:
        return self._directory / f"{stage}.plan"

    def _words(self, stage: str) -> str | None:
        return self.build.reached(self.plan(stage)) if self.build and self.plan(stage).is_file() else None
