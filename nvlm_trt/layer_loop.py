"""Runs the layers of a model one after the other, and keeps what they return: a run that was killed goes on there."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.staging import storage_errors

Array = npt.NDArray[Any]
Layer = Callable[[list[Array]], list[Array]]

_DONE = "done"  # beside the arrays: how many layers have run
# RuntimeError: the flags of a damaged zip file ask for a password, or for what zipfile does not implement
_UNREADABLE = (OSError, EOFError, KeyError, OverflowError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


class LayerLoop:
    """Runs stages, each a list of layers. A file per stage keeps the arrays behind its last finished layer."""

    def __init__(self, folder: Path | None = None, progress: Progress = no_progress) -> None:
        """`folder` None: nothing is kept."""
        self._folder = folder
        self._progress = progress

    def run(self, stage: str, arrays: Sequence[Array], layers: Sequence[Layer]) -> list[Array]:
        """Give `arrays` to the first layer, what each layer returns to the next, and return what the last one returns.

        Leaves out the layers that an earlier run of this stage has finished: the folder must belong to the same layers
        and arrays. Reports progress under the name `stage`. Raises EngineError for a full disk."""
        done, arrays = self._kept(stage) or (0, list(arrays))
        self._progress(stage, done, len(layers))
        for index in range(done, len(layers)):
            arrays = layers[index](arrays)
            self._keep(stage, index + 1, arrays)
            self._progress(stage, index + 1, len(layers))
        return arrays

    def _kept(self, stage: str) -> tuple[int, list[Array]] | None:
        """Return the number of finished layers and their arrays; None if there are none, or the file is damaged."""
        if self._folder is None:
            return None
        try:
            with np.load(self._file(stage, self._folder), allow_pickle=False) as kept:
                return int(kept[_DONE]), [kept[str(index)] for index in range(len(kept.files) - 1)]
        except _UNREADABLE:
            return None

    def _keep(self, stage: str, done: int, arrays: Sequence[Array]) -> None:
        if self._folder is None:
            return
        file = self._file(stage, self._folder)
        temporary = file.with_suffix(".tmp")
        with storage_errors(file):
            with temporary.open("wb") as stream:
                np.savez(stream, **{_DONE: np.array(done)}, **{str(i): array for i, array in enumerate(arrays)})
            os.replace(temporary, file)

    @staticmethod
    def _file(stage: str, folder: Path) -> Path:
        return folder / f"{stage.replace(' ', '_')}.npz"
