"""Measures what kept prompts save, and what they cost where nothing can be taken over.

    python -m lab.kept_prompts --work WORK

Each round asks two engines in this process in turn, one of which keeps the prompts of ended requests. TTFT in seconds,
of an image of 6+1 tiles that the image cache has already: a first and a second question about it, and a question that
goes on after the first one's answer; then two questions behind a system message of `--system-tokens` tokens. Throughput
is that of text requests whose prompts of `--prompt-tokens` tokens, longer than a chunk, have nothing in common. Answers
have to be equal, token by token. The vision encoder plays no part: its image tokens are drawn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

import numpy as np

from lab.common import parser, run
from lab.engines import random_engine
from lab.images import ImageSize, new_image
from lab.known_images import Started, know, open_without_vision, question, spent
from lab.rounds import Contender, Rounds
from nvlm_trt.api import Message
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import Pipeline, RuntimeOptions

RESULT = "kept_prompts.json"
KEPT, NOT_KEPT = "prompts kept", "nothing kept"
FIRST, SECOND, FOLLOW_UP = "TTFT of an image", "TTFT of it again", "TTFT of a follow-up"
SYSTEM, SYSTEM_AGAIN = "TTFT of a system message", "TTFT of it again, another question"
THROUGHPUT, COPYING = "tokens/s, nothing in common", "of its time spent in copies, %"


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precision", default="int8-weight-only")
    made.add_argument("--image-size", default="1344x896", help="WIDTHxHEIGHT")
    made.add_argument("--system-tokens", type=int, default=1024)
    made.add_argument("--prompt-tokens", type=int, default=300)
    made.add_argument("--output-tokens", type=int, default=32)
    made.add_argument("--requests", type=int, default=16)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    engine = random_engine(arguments.work, arguments.preset, arguments.precision)
    writer = PromptWriter(Tokenizer.from_directory(engine.path))
    answers: dict[str, list[list[int]]] = {KEPT: [], NOT_KEPT: []}
    with (
        open_without_vision(engine, arguments.threads, RuntimeOptions()) as kept,
        open_without_vision(engine, arguments.threads, RuntimeOptions(reuse_prompts=False)) as not_kept,
    ):
        contenders = {
            name: contender(pipeline, writer, arguments, answers[name])
            for name, pipeline in {KEPT: kept, NOT_KEPT: not_kept}.items()
        }
        rounds.run(contenders, arguments.rounds)
    assert answers[KEPT] == answers[NOT_KEPT], "kept prompts change answers"
    of_first = {
        metric: str(rounds.spread(KEPT, metric).median / rounds.spread(KEPT, first).median)[:6]
        for metric, first in {SECOND: FIRST, FOLLOW_UP: FIRST, SYSTEM_AGAIN: SYSTEM}.items()
    }
    ratios = [(metric, KEPT, NOT_KEPT) for metric in (FIRST, SECOND, FOLLOW_UP, SYSTEM, SYSTEM_AGAIN, THROUGHPUT)]
    rounds.report(ratios, of_the_first=of_first)
    for metric, share in of_first.items():
        print(f"{metric}: {share} of the first")


def contender(
    pipeline: Pipeline, writer: PromptWriter, arguments: argparse.Namespace, answers: list[list[int]]
) -> Contender:
    """Measures one engine. `answers` gets the tokens of all answers."""
    size = ImageSize.parse(arguments.image_size, "--image-size")
    random = np.random.default_rng(0)  # of each engine: both get the same texts
    backend = pipeline._generator._backend  # type: ignore[attr-defined]
    copies: list[float] = []
    backend.move_slot, backend.swap_slots = spent(backend.move_slot, copies), spent(backend.swap_slots, copies)

    def ttft(*messages: Message) -> float:
        answered = Started(pipeline, messages, 2).wait()
        answers.append(answered.token_ids)
        return answered.ttft

    def text(tokens: int) -> str:
        return writer.write(tokens, random)

    def measure() -> Mapping[str, float]:
        image = new_image(size)
        know(pipeline, image)
        asked = question(text(32), image)
        system = Message("system", text(arguments.system_tokens))
        times = {
            FIRST: ttft(asked),
            SECOND: ttft(question(text(32), image)),
            FOLLOW_UP: ttft(asked, Message("assistant", text(64)), question(text(32))),
            SYSTEM: ttft(system, question(text(32))),
            SYSTEM_AGAIN: ttft(system, question(text(32))),
        }
        prompts = [text(arguments.prompt_tokens) for _ in range(arguments.requests)]
        copies.clear()
        started = time.perf_counter()
        requests = [Started(pipeline, [question(prompt)], arguments.output_tokens) for prompt in prompts]
        answers.extend(request.wait().token_ids for request in requests)
        duration = time.perf_counter() - started
        tokens = arguments.requests * arguments.output_tokens
        return {**times, THROUGHPUT: tokens / duration, COPYING: 100 * sum(copies) / duration}

    return measure


if __name__ == "__main__":
    run(options(), measure, RESULT)
