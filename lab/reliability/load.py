"""Keeps requests running while something happens to the server, and says how each of them ended."""

from __future__ import annotations

import functools
import io
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import numpy as np
from PIL import Image

from lab.reliability.promise import BrokenPromise, require
from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import NvlmError
from nvlm_trt.serving.client import Client

FINISHED = "length"
_START_SECONDS = 120.0


class Load:
    """Runs streams of a fixed length, each in its own thread."""

    def __init__(self, address: str, count: int, tokens: int = 300, images: bool = False) -> None:
        self._client = Client(address)
        self._threads = ThreadPoolExecutor(count)
        self._streaming = [threading.Event() for _ in range(count)]
        self._sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        self._images = images
        self._closed = False
        self._futures: list[Future[str]] = [self._threads.submit(self._run, number) for number in range(count)]

    def wait_until_streaming(self) -> Load:
        """Waits until every request has received a token. Raises BrokenPromise if one does not."""
        for event in self._streaming:
            require(event.wait(_START_SECONDS), "a request received no token")
        return self

    def ends(self, seconds: float = 120.0) -> list[str]:
        """Waits for all requests. Returns how each ended: FINISHED, or its error.

        Raises BrokenPromise if one does not end, or ends with anything but one line."""
        try:
            found = [future.result(seconds) for future in self._futures]
        except FutureTimeoutError:
            raise BrokenPromise(f"a request did not end within {seconds:.0f} s") from None
        for end in found:
            require("\n" not in end and "Traceback" not in end, f"a request ended with more than one line: {end}")
        return found

    def require_finished(self, seconds: float = 120.0) -> None:
        """Checks that every request gave its whole answer."""
        failed = [end for end in self.ends(seconds) if end != FINISHED]
        require(not failed, f"{len(failed)} of {len(self._futures)} requests did not finish: {failed[:1]}")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.close()
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, number: int) -> str:
        images = [small_image(number)] if self._images else []
        try:
            reason = None
            for delta in self._client.stream(f"Tell me {number}", images=images, sampling=self._sampling):
                self._streaming[number].set()
                reason = delta.finish_reason
            return reason or "the stream ended without a reason"
        except NvlmError as error:
            return str(error)
        except ValueError as error:  # gRPC's, once its channel is closed
            return f"the client was closed ({error})"
        finally:
            self._streaming[number].set()


def answer_tokens(address: str, image: bool = False, seed: int = 0) -> list[int]:
    """Asks one greedy question. Raises BrokenPromise if it is not answered."""
    try:
        with Client(address) as client:
            images = [small_image(seed)] if image else []
            sampling = SamplingParams(max_tokens=8, ignore_eos=True)
            return list(client.generate("What is the total?", images=images, sampling=sampling).token_ids)
    except NvlmError as error:
        raise BrokenPromise(f"the server does not answer: {error}") from None


@functools.lru_cache(maxsize=64)
def small_image(seed: int, width: int = 120, height: int = 80) -> bytes:
    """Encodes a PNG of colour blocks, another for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(blocks).resize((width, height)).save(encoded, "PNG")
    return encoded.getvalue()
