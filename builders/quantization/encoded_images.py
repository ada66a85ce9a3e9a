"""Encodes each image of a build once, however many engines are asked about it, and keeps the image tokens on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nvlm_trt.backends.base import FloatArray, StepBackend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.engine import Engine
from nvlm_trt.image.tiling import normalise_tiles

# The gate's 500 samples of the document tasks take 1.2 GB for nvlm-d-small, 11 GB for nvlm-d-72b.
CAPACITY = 8 << 30


class EncodedImages(ClosedOnExit):
    """Holds the vision encoder of one engine, while it is needed, and a folder with the image tokens that it computed.

    A context manager that may be entered again: leaving it frees the vision encoder and keeps the folder."""

    def __init__(self, engine_dir: Path, folder: Path, capacity: int = CAPACITY) -> None:
        """Take an empty folder; its owner removes it. Beyond `capacity` bytes, and on a full disk, images are encoded
        whenever they are asked for."""
        self._engine_dir = engine_dir
        self._folder = folder
        self._room = capacity
        self._encoder: StepBackend | None = None
        self.complete = True  # every image that was encoded is in the folder: no engine is needed to give it again

    def encode(self, tiles: npt.NDArray[np.uint8]) -> FloatArray:
        """Return the image tokens [tiles, T, hidden] of RGB tiles [tiles, 3, E, E]. Loads the vision encoder for an
        image that is not in the folder. One thread calls at a time."""
        path = self._folder / f"{hashlib.sha256(tiles.tobytes()).hexdigest()}.npy"
        if path.exists():
            kept: FloatArray = np.load(path)
            return kept
        if self._encoder is None:
            self._encoder = open_backend(Engine.open(self._engine_dir), ["vision_encoder"])
        tokens = self._encoder.to_host(self._encoder.encode(normalise_tiles(tiles)))
        self.complete &= tokens.nbytes <= self._room and self._keep(path, tokens)
        return tokens

    def close(self) -> None:
        """Free the vision encoder."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def _keep(self, path: Path, tokens: FloatArray) -> bool:
        try:
            np.save(path, tokens)
        except OSError:  # no room on the disk: the build needs none for this
            path.unlink(missing_ok=True)
            self._room = 0
            return False
        self._room -= tokens.nbytes
        return True
