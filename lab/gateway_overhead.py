"""Measures what the OpenAI endpoint costs: the same requests over gRPC and over HTTP to one server, in turn.

    python -m lab.gateway_overhead --work WORK

The gateway is a process of its own in front of tritonserver. Throughput counts text requests of `--concurrency`
threads, each of which asks again when it is answered, all streamed. TTFT is that of single requests on an idle server,
until the first event that follows the headers, the median of `--repeats` in each round: text, and a known image. Both
ways have to give the same texts. The client's work is in both numbers; it reads HTTP's events with the standard
library.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

from lab.common import run
from lab.engines import random_engine
from lab.images import ImageSize, new_image
from lab.overhead import more, overhead_options, write_questions
from lab.rounds import Contender, Rounds
from nvlm_trt.api import ImagePart, Message, Part, SamplingParams, TextPart
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.triton.repository import RepositoryOptions
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer

RESULT = "gateway_overhead.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "numpy", "tritonclient", "nvidia-pytriton", "fastapi", "uvicorn")
THROUGHPUT, TEXT, REPEATED = "tokens/s", "TTFT of text ms", "TTFT of a known image ms"
GRPC, HTTP = "gRPC", "HTTP"


@dataclass(frozen=True)
class Answer:
    ttft: float
    text: str


Ask = Callable[[str, Sequence[bytes], int], Answer]  # a question, its images, the tokens to generate


def options() -> argparse.ArgumentParser:
    return overhead_options(__doc__, requests=16)


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    size = ImageSize.parse(arguments.image_size, "--image-size")
    engine = random_engine(arguments.work, arguments.preset, arguments.precision)
    questions = write_questions(engine.path, arguments)
    image = new_image(size)
    texts: dict[str, list[str]] = {}
    served = ServerOptions(repository=RepositoryOptions(threads=arguments.threads))
    with (
        TritonServer(engine.path, served) as server,
        Client(server.address) as client,
        gateway(server.address) as port,
    ):
        asks = {GRPC: over_grpc(client), HTTP: over_http(port, engine.config.name)}
        contenders = {name: contender(ask, questions, image, arguments, texts, name) for name, ask in asks.items()}
        rounds.run(contenders, arguments.rounds)
    assert texts[GRPC] == texts[HTTP], "the answers over HTTP differ"
    more_ms = {metric: str(more(rounds, metric, HTTP, GRPC)) for metric in (TEXT, REPEATED)}
    rounds.report([(THROUGHPUT, HTTP, GRPC)], more_ttft_ms=more_ms)
    for metric, spread in more_ms.items():
        print(f"{metric}: over HTTP {spread} more")


@contextmanager
def gateway(url: str) -> Iterator[int]:
    """Runs `nvlm-trt gateway` in front of a server; gives its port."""
    command = [sys.executable, "-m", "nvlm_trt.cli", "gateway", "--url", url, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            assert line, "the gateway did not start; see its message above"
            yield int(line.removesuffix("/v1").rpartition(":")[2])
        finally:
            process.terminate()


def over_grpc(client: Client) -> Ask:
    def ask(question: str, images: Sequence[bytes], tokens: int) -> Answer:
        started, ttft, text = time.perf_counter(), 0.0, ""
        parts: list[Part] = [*map(ImagePart, images), TextPart(question)]
        for delta in client.stream(messages=[Message("user", parts)], sampling=SamplingParams(tokens, ignore_eos=True)):
            ttft = ttft or time.perf_counter() - started
            text += delta.text
        return Answer(ttft, text)

    return ask


def over_http(port: int, model: str) -> Ask:
    def ask(question: str, images: Sequence[bytes], tokens: int) -> Answer:
        started, ttft, text = time.perf_counter(), 0.0, ""
        uris = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in images]
        content = [{"type": "image_url", "image_url": uri} for uri in uris] + [{"type": "text", "text": question}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens}
        data = json.dumps({**body, "ignore_eos": True, "stream": True}, allow_nan=False)
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data: {"):
                    ttft = ttft or time.perf_counter() - started
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return Answer(ttft, text)

    return ask


def contender(
    ask: Ask,
    questions: Sequence[str],
    image: bytes,
    arguments: argparse.Namespace,
    texts: dict[str, list[str]],
    name: str,
) -> Contender:
    """Times one way. `texts` gets the answers to all questions under `name`."""

    def measure() -> Mapping[str, float]:
        ask(questions[0], [image], 2)  # known from now on
        text = [ask(questions[0], [], 2).ttft for _ in range(arguments.repeats)]
        repeated = [ask(questions[0], [image], 2).ttft for _ in range(arguments.repeats)]
        started = time.perf_counter()
        with ThreadPoolExecutor(arguments.concurrency) as users:
            answers = list(users.map(lambda question: ask(question, [], arguments.output_tokens), questions))
        duration = time.perf_counter() - started
        texts[name] = [answer.text for answer in answers]
        return {
            THROUGHPUT: len(questions) * arguments.output_tokens / duration,
            TEXT: 1e3 * statistics.median(text),
            REPEATED: 1e3 * statistics.median(repeated),
        }

    return measure


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
