"""Measures the speed of several engines of one checkpoint, which take turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence

import numpy as np

from lab.engine_trace import encode, prefill, without_image_placeholder
from nvlm_trt.api import Message
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine
from nvlm_trt.evaluation.tinydocs import generate
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer

STEPS = 32  # decoding steps that are timed together
ROUNDS = 15


def speeds(engines: Sequence[Engine], threads: int) -> list[dict[str, float]]:
    """Returns each engine's medians over ROUNDS, in which the engines take turns, after one warm-up round."""
    sample = next(sample for sample in generate("test", count=1) if sample.images)
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in engines]
    with contextlib.ExitStack() as opened:
        backends = [opened.enter_context(open_backend(engine, threads=threads)) for engine in engines]
        prompts = PromptEncoder(engines[0].config, Tokenizer.from_directory(engines[0].path))
        for _ in range(ROUNDS + 1):
            for backend, (first_token, token) in zip(backends, times, strict=True):
                started = time.perf_counter()
                images = [encode(backend, data) for data in sample.images]
                prompt = prompts.encode([Message("user", sample.prompt)], [len(image) for image in images])
                last = without_image_placeholder(backend, prefill(backend, prompt, images)).argmax()
                first_token.append(time.perf_counter() - started)
                ranges = np.array([prompt.decode_range], np.int32)
                started = time.perf_counter()
                for step in range(STEPS):
                    position = np.array([len(prompt.input_ids) + step])
                    last = without_image_placeholder(
                        backend, backend.decode(np.array([last]), position, ranges)[0]
                    ).argmax()
                token.append((time.perf_counter() - started) / STEPS)
    return [
        {"ttft_ms": 1e3 * statistics.median(first_token[1:]), "tokens_per_s": 1 / statistics.median(token[1:])}
        for first_token, token in times
    ]
