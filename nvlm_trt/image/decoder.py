"""Decodes images within a budget of CPU time and memory for each, in worker processes, and in turns."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from nvlm_trt.closing import ClosedOnExit
from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.image.decoding_process import DecodingProcess, WorkerError
from nvlm_trt.image.worker_pool import WorkerPool
from nvlm_trt.lane import AbandonedError, IsOver, Lane, never
from nvlm_trt.machine import available_cores

_MOST_WORKERS = 4
_POLL_SECONDS = 0.02
# An image that takes longer moves to the lane for slow images and a lower priority, so that it holds up neither the
# images behind it nor the answers. Most photographs of some megapixels take less.
_QUICK_SECONDS = 0.1
_SLOW_NICE = 10
_MOST_REUSED = 256 << 20  # bytes that a worker had mapped at once
# By the clock; only a worker that is stopped, or gets next to no CPU time, takes so long.
_STALLED_SECONDS = 30
_STALLED_FACTOR = 20


def default_workers() -> int:
    """Count the images to decode at once: half of the cores are left to the encoder and the decoder."""
    return max(1, min(_MOST_WORKERS, available_cores() // 2))


class ImageDecoder(ClosedOnExit):
    """Decodes at most `workers` quick images and `workers` slow ones at once. The others wait in order of arrival.

    Thread-safe. Starts processes when the first image comes."""

    def __init__(self, limits: ImageLimits | None = None, workers: int | None = None) -> None:
        self._limits = limits or ImageLimits()
        workers = workers or default_workers()
        self._quick, self._slow = Lane(workers), Lane(workers)
        self._pool = WorkerPool()

    @contextlib.contextmanager
    def turn(self, is_over: IsOver = never) -> Iterator[Turn]:
        """Wait for a turn to decode one image, and hold it during the `with` block.

        Raises AbandonedError, and ends the decoding, soon after `is_over` returns True."""
        turn = Turn(self._limits, self._pool, self._quick, self._slow, is_over)
        try:
            yield turn
        finally:
            turn.end()

    def load(self, data: bytes) -> Image.Image:
        """Decode to mode RGB. Raises ImageError as `load_image` does, and for an image that exceeds its budget."""
        with self.turn() as turn:
            return Image.fromarray(turn.pixels(data))

    def close(self) -> None:
        """End the idle workers; each other one ends with its image."""
        self._pool.close()


class Turn:
    """The turn of one image."""

    def __init__(self, limits: ImageLimits, pool: WorkerPool, quick: Lane, slow: Lane, is_over: IsOver) -> None:
        """Wait for a place in the lane `quick`. Raises AbandonedError."""
        self._limits, self._pool, self._quick, self._slow, self._is_over = limits, pool, quick, slow, is_over
        self._lane: Lane | None = None  # in which this turn has a place
        self._enter(quick)

    def pixels(self, data: bytes) -> npt.NDArray[np.uint8]:
        """Decode to RGB [height, width, 3]. Raises ImageError and AbandonedError."""
        return self._run(data, None, None)

    def tiles(self, data: bytes, tile_size: int, max_tiles: int) -> npt.NDArray[np.uint8]:
        """Decode and cut into RGB tiles [tiles, 3, tile_size, tile_size]. Raises as `pixels` does, and RequestError."""
        return self._run(data, tile_size, max_tiles)

    def end(self) -> None:
        """Give the place back."""
        if self._lane is not None:
            self._lane.leave()
        self._lane = None

    def _enter(self, lane: Lane) -> None:
        self.end()
        lane.enter(self._is_over)
        self._lane = lane

    def _run(self, data: bytes, tile_size: int | None, max_tiles: int | None) -> npt.NDArray[np.uint8]:
        job = {"tile_size": tile_size, "max_tiles": max_tiles, "limits": asdict(self._limits)}
        try:
            pixels = self._attempt(job, data)
            while pixels is None:
                self._enter(self._slow)
                pixels = self._attempt(job, data)
        except WorkerError as ended:
            raise self._error(ended) from None
        return pixels

    def _attempt(self, job: Mapping[str, Any], data: bytes) -> npt.NDArray[np.uint8] | None:
        """Return the pixels, or None if the image is slow and the lane for slow images is full."""
        process = self._pool.take()
        reusable = False
        try:
            if self._lane is self._slow:
                process.lower_priority(_SLOW_NICE)
            cpu_before = process.cpu_seconds()
            process.start(job, data)
            give_up = time.monotonic() + _STALLED_SECONDS + _STALLED_FACTOR * self._limits.max_decode_seconds
            while (reply := process.reply(_POLL_SECONDS)) is None:
                if self._is_over():
                    raise AbandonedError
                if time.monotonic() > give_up:
                    raise ImageError("image: decoding got no CPU time; send it again when the machine is less busy")
                if self._lane is self._quick and process.cpu_seconds() - cpu_before > _QUICK_SECONDS:
                    if not self._slow.try_enter():
                        return None
                    self._quick.leave()
                    self._lane = self._slow
                    process.lower_priority(_SLOW_NICE)
            # a worker has a lower priority for good, and keeps the memory between the pieces that it has freed
            reusable = self._lane is self._quick and reply["memory_used"] < _MOST_REUSED
            return self._result(reply, process)
        finally:
            if reusable:
                self._pool.put_back(process)
            else:
                process.close()

    def _result(self, reply: Mapping[str, Any], process: DecodingProcess) -> npt.NDArray[np.uint8]:
        if "shape" in reply:
            return process.pixels(reply["shape"])
        most = self._limits.max_decode_memory >> 20
        if "memory" in reply:
            raise ImageError(
                f"image: decoding takes more than {most} MiB of memory; scale it down, or raise --max-decode-memory"
            )
        if "defect" in reply:
            raise RuntimeError(f"in the process that decodes images: {reply['defect']}")
        message = reply["message"]
        if reply["memory_used"] > self._limits.max_decode_memory / 2:  # libjpeg and libtiff do not say why they fail
            message += f", or raise --max-decode-memory above {most} MiB"
        raise {"ImageError": ImageError, "RequestError": RequestError}[reply["error"]](message)

    def _error(self, ended: WorkerError) -> ImageError:
        """Explain why a worker has ended in the middle of an image."""
        if ended.signal == signal.SIGPROF:
            return ImageError(
                f"image: decoding took more than {self._limits.max_decode_seconds:g} s of CPU time; save it again as a "
                "plain PNG or JPEG, or raise --max-decode-seconds"
            )
        by = f" ({signal.Signals(ended.signal).name})" if ended.signal else ""
        return ImageError(f"image: decoding ended its process{by}; save it again as a plain PNG or JPEG")
