"""Measures what turns save where long prompts and short ones arrive together.

    python -m lab.turns --work WORK

`--texts` questions of text alone and `--images` questions about an image of 6+1 tiles, known to the image cache, arrive
together, in an order that is drawn once. They are read in turns, or in the order of arrival: the scheduler does that if
each request has its number as priority. TTFT and the longest gap between two tokens are in seconds. The vision encoder
plays no part: its image tokens are drawn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping

import numpy as np

from lab.common import parser, run
from lab.engines import random_engine
from lab.images import ImageSize, new_image
from lab.known_images import Started, know, open_without_vision, question, spent
from lab.rounds import Contender, Rounds
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

RESULT = "turns.json"
IN_TURNS, BY_ARRIVAL = "in turns", "in the order of arrival"
TEXT, IMAGE, THROUGHPUT = "median TTFT of text", "median TTFT with an image", "tokens/s"
GAP, LEAST = "longest gap", "slowest chunk plus slowest step"


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precision", default="int8-weight-only")
    made.add_argument("--image-size", default="1344x896", help="WIDTHxHEIGHT")
    made.add_argument("--texts", type=int, default=8)
    made.add_argument("--images", type=int, default=4)
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--output-tokens", type=int, default=64)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    engine = random_engine(arguments.work, arguments.preset, arguments.precision)
    size = ImageSize.parse(arguments.image_size, "--image-size")
    writer, random = PromptWriter(Tokenizer.from_directory(engine.path)), np.random.default_rng(0)
    texts = [writer.write(arguments.prompt_tokens, random) for _ in range(arguments.texts + arguments.images)]
    images = [new_image(size) if index < arguments.images else None for index in random.permutation(len(texts))]
    answers: dict[str, list[list[int]]] = {}
    # nothing is kept: both sides read every prompt as a whole in every round
    with open_without_vision(engine, arguments.threads, RuntimeOptions(reuse_prompts=False)) as pipeline:
        for image in filter(None, images):
            know(pipeline, image)
        backend = pipeline._generator._backend  # type: ignore[attr-defined]
        chunks: list[float] = []
        steps: list[float] = []
        backend.prefill, backend.decode = spent(backend.prefill, chunks), spent(backend.decode, steps)

        def contender(name: str) -> Contender:
            def measure() -> Mapping[str, float]:
                chunks.clear()
                steps.clear()
                return {
                    **mix(pipeline, texts, images, arguments.output_tokens, name, answers),
                    LEAST: max(chunks) + max(steps),
                }

            return measure

        rounds.run({name: contender(name) for name in (IN_TURNS, BY_ARRIVAL)}, arguments.rounds)
    assert len({str(tokens) for tokens in answers.values()}) <= 1, "the order of prompts changes answers"
    rounds.report([(metric, IN_TURNS, BY_ARRIVAL) for metric in (TEXT, IMAGE, THROUGHPUT, GAP)])


def mix(
    pipeline: Pipeline,
    texts: list[str],
    images: list[bytes | None],
    tokens: int,
    name: str,
    answers: dict[str, list[list[int]]],
) -> Mapping[str, float]:
    """Asks everything at once. `answers` gets the tokens under `name`."""
    started = time.perf_counter()
    requests = [
        Started(pipeline, [question(text, image)], tokens, priority=index if name == BY_ARRIVAL else 0)
        for index, (text, image) in enumerate(zip(texts, images, strict=True))
    ]
    answered = [request.wait() for request in requests]
    duration = time.perf_counter() - started
    answers[name] = [each.token_ids for each in answered]
    of_text, of_image = (
        [each.ttft for each, image in zip(answered, images, strict=True) if (image is None) is text_alone]
        for text_alone in (True, False)
    )
    return {
        TEXT: statistics.median(of_text),
        IMAGE: statistics.median(of_image),
        THROUGHPUT: len(texts) * tokens / duration,
        GAP: max(gap for each in answered for gap in each.gaps),
    }


if __name__ == "__main__":
    run(options(), measure, RESULT)
