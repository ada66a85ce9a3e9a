"""Tests that decoding keeps to its budget, takes turns, and leaves no process behind."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from lab import bombs
from nvlm_trt.errors import ImageError, RequestError
from nvlm_trt.image import decoder as decoder_module
from nvlm_trt.image import decoding_process, fork_server
from nvlm_trt.image.decoder import ImageDecoder
from nvlm_trt.image.decoding import ImageLimits, load_image
from nvlm_trt.image.fork_server import ForkServer
from nvlm_trt.image.tiling import normalise_tiles, tile_image
from nvlm_trt.lane import AbandonedError, IsOver, never

WAIT = 60.0  # seconds, for what takes less than one, and hours without a budget
ROOT = Path(__file__).parents[2]
# decoding it takes as long as anybody lets it
ENDLESS = bombs.scans(count=20_000)


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def noise(seed: int = 0, width: int = 120, height: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiles(decoder: ImageDecoder, data: bytes, is_over: IsOver = never) -> np.ndarray:
    with decoder.turn(is_over) as turn:
        return turn.tiles(data, 56, 6)


@pytest.fixture
def decoder() -> Iterator[ImageDecoder]:
    with ImageDecoder(workers=1) as made:
        yield made


# --- pixels and errors are those of load_image -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(120, 80), (56, 56), (900, 300)])
def test_tiles_are_those_of_the_image(decoder: ImageDecoder, size: tuple[int, int]) -> None:
    data = encoded(noise(1, *size))
    expected = tile_image(load_image(data), 56, 6)
    np.testing.assert_array_equal(normalise_tiles(tiles(decoder, data)), expected)
    np.testing.assert_array_equal(np.asarray(decoder.load(data)), np.asarray(load_image(data)))


def test_a_smaller_image_after_a_larger_one(decoder: ImageDecoder) -> None:
    for size in ((3000, 2000), (16, 9), (700, 800)):
        image = noise(2, *size)
        np.testing.assert_array_equal(np.asarray(decoder.load(encoded(image, "BMP"))), np.asarray(image))


@pytest.mark.parametrize("data", [b"", b"text", encoded(noise())[:-200], encoded(noise(0, 64, 1))])
def test_errors_are_those_of_load_image(decoder: ImageDecoder, data: bytes) -> None:
    with pytest.raises(ImageError) as expected:
        load_image(data)
    with pytest.raises(ImageError) as found:
        decoder.load(data)
    assert str(found.value) == str(expected.value)


def test_limits_and_options_reach_the_worker() -> None:
    with ImageDecoder(ImageLimits(max_pixels=99)) as decoder, pytest.raises(ImageError, match="at most 99 in all"):
        decoder.load(encoded(noise()))
    with ImageDecoder() as decoder, pytest.raises(RequestError, match="max_tiles 0"), decoder.turn() as turn:
        turn.tiles(encoded(noise()), 56, 0)


# --- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", bombs.BOMBS)
def test_a_bomb_ends_within_its_cpu_time(image_format: str) -> None:
    bomb = ENDLESS if image_format == "JPEG" else bombs.BOMBS[image_format](0)
    with ImageDecoder(ImageLimits(max_decode_seconds=0.2), workers=1) as decoder:
        started = time.monotonic()
        with pytest.raises(ImageError) as caught:
            tiles(decoder, bomb)
        assert time.monotonic() - started < WAIT
        assert str(caught.value) == (
            "image: decoding took more than 0.2 s of CPU time; save it again as a plain PNG or JPEG, or raise "
            "--max-decode-seconds"
        )
        assert len(tiles(decoder, encoded(noise()))) == 7  # the next image has a budget of its own


def test_the_budget_is_of_each_image_and_not_of_the_worker() -> None:
    data = encoded(noise(3, 1000, 1000))
    with ImageDecoder(ImageLimits(max_decode_seconds=1), workers=1) as decoder:
        process = decoder._pool.take()
        decoder._pool.put_back(process)
        while process.cpu_seconds() < 1.2:
            decoder.load(data)
        assert decoder._pool.take() is process


@pytest.mark.parametrize("image_format", bombs.BOMBS)
def test_a_bomb_ends_within_its_memory(image_format: str) -> None:
    bomb = bombs.scans(count=1) if image_format == "JPEG" else bombs.BOMBS[image_format](0)
    with ImageDecoder(ImageLimits(max_decode_memory=48 << 20), workers=1) as decoder:
        with pytest.raises(ImageError, match=r"^image: .*; ") as caught:
            tiles(decoder, bomb)
        assert "\n" not in str(caught.value)
        if image_format != "WEBP":  # libwebp reserves all memory first, and tells no reason when it cannot
            assert "raise --max-decode-memory" in str(caught.value)
            assert "48 MiB" in str(caught.value)
        assert len(tiles(decoder, encoded(noise()))) == 7


def test_the_largest_photograph_fits_the_default_budget(decoder: ImageDecoder) -> None:
    photograph = noise(4, 500, 500).resize((7990, 7990), Image.Resampling.BILINEAR)
    assert len(tiles(decoder, encoded(photograph, "JPEG"))) == 5


# --- turns and cancellation ------------------------------------------------------------------------------------------


def test_a_cancelled_decoding_ends_at_once(decoder: ImageDecoder) -> None:
    over = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        decoding = pool.submit(tiles, decoder, ENDLESS, over.is_set)
        worker = wait_for(lambda: next(iter(busy_workers()), None))
        over.set()
        with pytest.raises(AbandonedError):
            decoding.result(WAIT)
    wait_for(lambda: not worker.is_running())
    assert len(tiles(decoder, encoded(noise()))) == 7


def test_a_quick_image_does_not_wait_for_slow_ones() -> None:
    """Also when there are more slow ones than workers: each of those had its turn."""
    limits = ImageLimits(max_decode_seconds=1000)
    over = threading.Event()
    with ImageDecoder(limits, workers=1) as decoder, ThreadPoolExecutor(5) as pool:
        slow = [pool.submit(tiles, decoder, ENDLESS, over.is_set) for _ in range(5)]
        try:
            for seed in range(3):
                assert len(tiles(decoder, encoded(noise(seed)))) == 7
            assert not any(decoding.done() for decoding in slow)
            assert len(busy_workers()) <= 2
        finally:
            over.set()
        for decoding in slow:
            with pytest.raises(AbandonedError):
                decoding.result(WAIT)


def test_slow_images_come_through_one_after_another() -> None:
    data = encoded(noise(5, 2000, 2000))
    with ImageDecoder(workers=1) as decoder, ThreadPoolExecutor(4) as pool:
        decoded = pool.map(lambda _: tiles(decoder, data), range(4))
        for found in decoded:
            np.testing.assert_array_equal(normalise_tiles(found), tile_image(load_image(data), 56, 6))


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def aborting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes workers that abort, wait or raise an error when an image begins so."""
    patch = """
import os, time
from nvlm_trt.image import decoding_worker
load = decoding_worker.load_image
def faulty(data, limits=None):
    if data.startswith(b"abort"):
        os.abort()
    if data.startswith(b"wait"):
        time.sleep(1000)
    if data.startswith(b"defect"):
        raise ZeroDivisionError
    return load(data, limits)
decoding_worker.load_image = faulty
"""
    monkeypatch.setattr(fork_server, "_CODE", fork_server._CODE + patch)
    server = ForkServer()
    monkeypatch.setattr(decoding_process, "FORK_SERVER", server)
    yield
    server.stop()


@pytest.mark.usefixtures("aborting")
def test_a_crash_is_one_line_and_the_next_image_is_decoded(decoder: ImageDecoder) -> None:
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            tiles(decoder, b"abort")
        assert str(caught.value) == (
            "image: decoding ended its process (SIGABRT); save it again as a plain PNG or JPEG"
        )
        assert len(tiles(decoder, encoded(noise()))) == 7
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        tiles(decoder, b"defect")


@pytest.mark.usefixtures("aborting")
def test_a_worker_that_stands_still_is_given_up(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "_STALLED_SECONDS", 0.2)
    monkeypatch.setattr(decoder_module, "_STALLED_FACTOR", 0)
    with pytest.raises(ImageError, match="decoding got no CPU time; send it again"):
        tiles(decoder, b"wait")


@pytest.mark.usefixtures("aborting")
def test_a_server_that_was_killed_is_started_again(decoder: ImageDecoder) -> None:
    assert len(tiles(decoder, encoded(noise()))) == 7
    server = decoding_process.FORK_SERVER._process
    assert server is not None
    workers = psutil.Process(server.pid).children()
    for process in (*workers, server):
        process.send_signal(signal.SIGKILL)
    server.wait(WAIT)
    wait_for(lambda: not any(worker.is_running() for worker in workers))
    assert len(tiles(decoder, encoded(noise()))) == 7


def test_the_server_imports_little_and_has_one_thread(decoder: ImageDecoder) -> None:
    decoder.load(encoded(noise()))
    (server,) = servers(psutil.Process())
    assert server.num_threads() == 1
    code = "import sys; import nvlm_trt.image.decoding_worker; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "onnxruntime", "tokenizers", "tritonclient", "psutil"} & set(loaded.split())


@pytest.mark.parametrize("busy", [True, False])
def test_workers_die_with_their_owner(busy: bool, tmp_path: Path) -> None:
    (tmp_path / "bomb").write_bytes(ENDLESS)
    (tmp_path / "small").write_bytes(encoded(noise()))
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from nvlm_trt.image.decoder import ImageDecoder\n"
        "from nvlm_trt.image.decoding import ImageLimits\n"
        "decoder = ImageDecoder(ImageLimits(max_decode_seconds=1000))\n"
        "decoder.load(Path(sys.argv[1]).read_bytes())\n"
        "print('ready', flush=True)\n"
        "if len(sys.argv) > 2:\n"
        "    decoder.load(Path(sys.argv[2]).read_bytes())\n"
        "time.sleep(1000)\n"
    )
    files = [tmp_path / "small", *([tmp_path / "bomb"] if busy else [])]
    owner = subprocess.Popen([sys.executable, "-c", script, *files], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        (server,) = servers(psutil.Process(owner.pid))
        if busy:
            wait_for(lambda: busy_workers(server))
        processes = [server, *server.children()]
        assert len(processes) > 1
    finally:
        owner.kill()
        owner.wait()
    for process in processes:
        wait_for(lambda process=process: not process.is_running())  # type: ignore[misc]


def test_closing_ends_the_workers() -> None:
    with ImageDecoder(workers=2) as decoder:
        decoder.load(encoded(noise()))
        process = decoder._pool.take()
        decoder._pool.put_back(process)
        worker = process._process
        assert worker.is_running()
    wait_for(lambda: not worker.is_running())


def servers(owner: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in owner.children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if any("decoding_worker" in word for word in child.cmdline()):
                found.append(child)
    return found


def busy_workers(server: psutil.Process | None = None) -> list[psutil.Process]:
    """Lists the workers that are decoding: they take CPU time."""
    found = []
    for parent in [server] if server else servers(psutil.Process()):
        for worker in parent.children():
            with contextlib.suppress(psutil.Error):
                if worker.cpu_times().user > 0.05 and worker.status() == psutil.STATUS_RUNNING:
                    found.append(worker)
    return found


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found
