"""Keeps what a calibration by layer has measured in a folder beside the engine, so that a killed one goes on there.

A file appears whole or not at all. The activations between two parts of the model are float32 numbers without a header,
in the order in which they are read again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nvlm_trt.backends.base import FloatArray
from nvlm_trt.builders.quantization.calibration import Calibration, read_calibration
from nvlm_trt.builders.quantization.observations import Observations
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.engine import CALIBRATION
from nvlm_trt.errors import EngineError
from nvlm_trt.owned_folder import abandoned, take_folder
from nvlm_trt.staging import storage_errors

_WHAT = "what.json"  # what is calibrated: the folder of another checkpoint or other samples is of no use
_NAME = ".{}.calibration"
_SCRATCH = "graphs"


def calibration_folder(output: Path) -> Path:
    """Return the folder of the calibration for the engine `output`, beside it."""
    return output.parent / _NAME.format(output.name[:40])


def remove_calibration(output: Path) -> None:
    """Remove the folder of the calibration for the engine `output`, unless another process uses it."""
    for folder in abandoned([calibration_folder(output)]):
        shutil.rmtree(folder, ignore_errors=True)


class PartStore(ClosedOnExit):
    """Holds the folder of one calibration, locked. A part is named by a string, a block of samples by its number."""

    def __init__(self, folder: Path, what: Mapping[str, Any]) -> None:
        """Open the folder of a calibration of `what`, or make it. Raises EngineError for a folder that another process
        uses or that cannot be written."""
        self._folder = folder
        with storage_errors(folder):
            if not folder.parent.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
            owner = take_folder(folder)
            if owner is None:
                raise EngineError(f"{folder} is used by another build; wait for it or choose another --output")
            self._lock = owner
            try:
                self._claim(json.dumps(what, sort_keys=True, allow_nan=False))
            except BaseException:
                self.close()
                raise

    def _claim(self, what: str) -> None:
        path = self._folder / _WHAT
        if not path.exists() or path.read_text(encoding="utf-8") != what:
            for entry in self._folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            with self._appearing(path) as file:
                file.write(what.encode())

    # --- activations and observations --------------------------------------------------------------------------------

    def is_measured(self, part: str, block: int) -> bool:
        return self._observations(part, block).exists()

    @contextlib.contextmanager
    def activations(self, part: str, block: int) -> Iterator[ActivationReader]:
        """Open what a part has given for a block of samples."""
        with self._activations(part, block).open("rb") as file:
            yield ActivationReader(file)

    @contextlib.contextmanager
    def new_activations(self, part: str, block: int) -> Iterator[BinaryIO]:
        """Yield a file for the activations that a part gives: they appear at the end of the context."""
        with storage_errors(self._folder), self._appearing(self._activations(part, block)) as file:
            yield file

    def add(self, part: str, block: int, observations: Observations) -> None:
        """Keep what was observed. A part counts as measured for the block from now on."""
        with storage_errors(self._folder), self._appearing(self._observations(part, block)) as file:
            observations.save(file)

    def observations(self, part: str, block: int) -> Observations:
        return Observations.load(self._observations(part, block))

    def drop(self, part: str, block: int) -> None:
        """Remove activations that no part reads any more."""
        self._activations(part, block).unlink(missing_ok=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder for one part's graphs, and remove it at the end."""
        folder = self._folder / _SCRATCH
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- the result --------------------------------------------------------------------------------------------------

    def result(self) -> Calibration | None:
        """Return the finished calibration, if there is one."""
        path = self._folder / CALIBRATION
        return read_calibration(path) if path.exists() else None

    def finish(self, calibration: Calibration) -> None:
        """Keep the finished calibration in place of everything that it was made of."""
        temporary = self._folder / f"{CALIBRATION}.new"
        with storage_errors(self._folder):
            calibration.save(temporary)
            os.replace(temporary, self._folder / CALIBRATION)
            for ending in ("f32", "npz"):
                for path in self._folder.glob(f"*.{ending}"):
                    path.unlink()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _activations(self, part: str, block: int) -> Path:
        return self._folder / f"{part}.{block}.f32"

    def _observations(self, part: str, block: int) -> Path:
        return self._folder / f"{part}.{block}.npz"

    @contextlib.contextmanager
    def _appearing(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file that gets its name when the context ends without an error."""
        temporary = path.with_name(f"{path.name}.new")
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


class ActivationReader:
    """Reads arrays from a file in the order in which they were written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def next(self, shape: Sequence[int]) -> FloatArray:
        """Read the next array. Raises EngineError at the end of the file."""
        values = np.empty(shape, np.float32)
        if self._file.readinto(values.reshape(-1).view(np.uint8)) != values.nbytes:  # type: ignore[attr-defined]
            raise EngineError(
                f"{self._file.name} is too short; remove {Path(self._file.name).parent} and start the build again"
            )
        return values
