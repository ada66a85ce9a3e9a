"""Measures the cost of serving: the same requests to an engine in this process and through Triton, in turn.

    python -m lab.serving_overhead --work WORK

Throughput counts text requests of `--concurrency` threads, each of which asks again when it is answered. TTFT is that
of single requests on an idle engine, the median of `--repeats` in each round: text, a new image, and that image again.
Both sides run on the same cores, one at a time; the client's work is in both numbers. Their answers have to be
equal, token by token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lab.common import run
from lab.engines import random_engine
from lab.images import ImageSize, new_image
from lab.overhead import more, overhead_options, write_questions
from lab.rounds import Contender, Rounds
from nvlm_trt.api import ChatRequest, Delta, Message, SamplingParams
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.triton.repository import RepositoryOptions
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer

RESULT = "serving_overhead.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "numpy", "tritonclient", "nvidia-pytriton")
THROUGHPUT = "tokens/s"
TEXT, NEW, REPEATED = "TTFT of text ms", "TTFT of a new image ms", "TTFT of it again ms"
IN_PROCESS, SERVED = "in process", "through Triton"

Ask = Callable[[str, Sequence[bytes], SamplingParams], Iterator[Delta]]  # a question about images


@dataclass(frozen=True)
class Answer:
    ttft: float
    token_ids: list[int]


def options() -> argparse.ArgumentParser:
    return overhead_options(__doc__, requests=32)


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    size = ImageSize.parse(arguments.image_size, "--image-size")
    engine = random_engine(arguments.work, arguments.preset, arguments.precision)
    questions = write_questions(engine.path, arguments)
    answers: dict[str, list[list[int]]] = {}
    served = ServerOptions(repository=RepositoryOptions(threads=arguments.threads))
    with (
        Pipeline.open(engine.path, threads=arguments.threads) as pipeline,
        TritonServer(engine.path, served) as server,
        Client(server.address) as client,
    ):
        asks: dict[str, Ask] = {IN_PROCESS: in_process(pipeline), SERVED: through_triton(client)}
        contenders = {name: contender(ask, questions, size, arguments, answers, name) for name, ask in asks.items()}
        rounds.run(contenders, arguments.rounds)
    assert len({str(tokens) for tokens in answers.values()}) <= 1, "the served engine gives other answers"
    ratios = [(THROUGHPUT, SERVED, IN_PROCESS), (REPEATED, SERVED, IN_PROCESS)]
    rounds.report(
        ratios, more_ttft_ms={metric: str(more(rounds, metric, SERVED, IN_PROCESS)) for metric in (TEXT, NEW, REPEATED)}
    )
    for metric in (TEXT, NEW, REPEATED):
        print(f"{metric}: through Triton {more(rounds, metric, SERVED, IN_PROCESS)} more")


def in_process(pipeline: Pipeline) -> Ask:
    def ask(question: str, images: Sequence[bytes], sampling: SamplingParams) -> Iterator[Delta]:
        return pipeline.generate(ChatRequest([Message("user", question)], images, sampling))

    return ask


def through_triton(client: Client) -> Ask:
    def ask(question: str, images: Sequence[bytes], sampling: SamplingParams) -> Iterator[Delta]:
        return client.stream(question, images=images, sampling=sampling)

    return ask


def contender(
    ask: Ask,
    questions: Sequence[str],
    size: ImageSize,
    arguments: argparse.Namespace,
    answers: dict[str, list[list[int]]],
    name: str,
) -> Contender:
    """Times one side. `answers` gets the tokens of all questions under `name`."""

    def measure() -> Mapping[str, float]:
        texts, new, repeated = [], [], []
        for _ in range(arguments.repeats):
            texts.append(answer(ask, questions[0], [], 2).ttft)
            image = new_image(size)
            new.append(answer(ask, questions[0], [image], 2).ttft)
            repeated.append(answer(ask, questions[0], [image], 2).ttft)
        started = time.perf_counter()
        with ThreadPoolExecutor(arguments.concurrency) as users:
            answered = list(users.map(lambda question: answer(ask, question, [], arguments.output_tokens), questions))
        duration = time.perf_counter() - started
        answers[name] = [each.token_ids for each in answered]
        return {
            THROUGHPUT: len(questions) * arguments.output_tokens / duration,
            TEXT: 1e3 * statistics.median(texts),
            NEW: 1e3 * statistics.median(new),
            REPEATED: 1e3 * statistics.median(repeated),
        }

    return measure


def answer(ask: Ask, question: str, images: Sequence[bytes], tokens: int) -> Answer:
    started = time.perf_counter()
    ttft = 0.0
    token_ids: list[int] = []
    for delta in ask(question, images, SamplingParams(max_tokens=tokens, ignore_eos=True)):
        if delta.token_ids and not token_ids:
            ttft = time.perf_counter() - started
        token_ids += delta.token_ids
    assert len(token_ids) == tokens, f"{len(token_ids)} tokens instead of {tokens}"
    return Answer(ttft, token_ids)


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
