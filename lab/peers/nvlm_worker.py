"""Runs the whole path in the product. The client starts this worker:

python -m lab.peers.nvlm_worker ENGINE THREADS
"""

from __future__ import annotations

import base64
import queue
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lab.peers.worker import Answer, Clock, serve
from nvlm_trt.api import ChatRequest, Delta, Message, SamplingParams
from nvlm_trt.backends.base import BackendArray
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.image.tiling import normalise_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.batcher import Batcher
from nvlm_trt.runtime.pipeline import Pipeline


def main() -> None:
    serve(lambda: load(Engine.open(Path(sys.argv[1])), threads=int(sys.argv[2])))


def load(engine: Engine, threads: int) -> tuple[str, Answer]:
    backend = open_backend(engine, threads=threads)
    tokenizer = Tokenizer.from_directory(engine.path)
    vision_s = 0.0

    def encode_tiles(tiles: npt.NDArray[np.uint8]) -> BackendArray:
        nonlocal vision_s
        started = time.perf_counter()
        tokens = backend.encode(normalise_tiles(tiles))
        vision_s = time.perf_counter() - started
        return tokens

    pipeline = Pipeline(engine, Batcher(backend, tokenizer), tokenizer, encode_tiles=encode_tiles)

    def answer(image: str, question: str, tokens: int) -> dict[str, Any]:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        request = ChatRequest([Message("user", question)], [base64.b64decode(image)], sampling)
        answers: list[int] = []
        ended: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()

        def on_delta(delta: Delta) -> None:
            for token in delta.token_ids:
                clock.tick()
                answers.append(token)
            if delta.finish_reason is not None:
                ended.put(delta)

        clock = Clock()
        pipeline.submit(request, on_delta, ended.put)
        last = ended.get()
        if isinstance(last, Exception):
            raise last
        usage = last.usage
        assert usage is not None, "the last delta has the usage"
        assert usage.ttft_s is not None, "an answer of some tokens"
        assert not usage.cached_images, "the image is known"
        return clock.answer(
            answers,
            usage.prompt_tokens,
            usage.image_tokens,
            vision_encoder=vision_s,
            prefill=usage.ttft_s - usage.queue_s,
        )

    return "nvlm-trt", answer


if __name__ == "__main__":
    main()
