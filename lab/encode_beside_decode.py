"""Measures whether encoding images and decoding answers at the same time wastes the cores they share.

    python -m lab.encode_beside_decode --work WORK

One server encodes new images in one process and decodes text answers in another. Each round counts, for `--seconds`
each: tokens/s without images, images/s without text, and both at once. The sum of both shares (tokens/s beside images
over tokens/s alone, plus the same of images/s) is 1 if the two merely take turns; below 1, they fight for the cores.
The contenders differ in the priority of the encoder's process.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from lab.common import run
from lab.engines import random_engine
from lab.images import ImageSize, new_image
from lab.overhead import overhead_options, write_questions
from lab.rounds import Contender, Rounds
from nvlm_trt.api import SamplingParams
from nvlm_trt.engine import Engine
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.triton.repository import RepositoryOptions
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer

RESULT = "encode_beside_decode.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "openvino", "numpy", "tritonclient", "nvidia-pytriton")
SHARES = "sum of shares"
TOKENS, IMAGES = "tokens/s", "images/s"
BESIDE = "{} at once"


def options() -> argparse.ArgumentParser:
    made = overhead_options(__doc__, requests=8)
    made.add_argument("--seconds", type=float, default=15, help="length of each measurement")
    made.add_argument("--niceness", nargs="+", type=int, default=[0, 5, 10], help="of the encoder's process")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    engine = random_engine(arguments.work, arguments.preset, arguments.precision)
    questions = write_questions(engine.path, arguments)
    contenders = {
        f"encoder at niceness {niceness}": contender(engine, questions, arguments, niceness)
        for niceness in arguments.niceness
    }
    rounds.run(contenders, arguments.rounds)
    first, *others = contenders
    rounds.report([(SHARES, other, first) for other in others])


def contender(engine: Engine, questions: Sequence[str], arguments: argparse.Namespace, niceness: int) -> Contender:
    """Starts a server, and measures it: each apart, then both at once."""
    size = ImageSize.parse(arguments.image_size, "--image-size")
    repository = RepositoryOptions(threads=arguments.threads, encoder_niceness=niceness)

    def measure() -> Mapping[str, float]:
        with (
            TritonServer(engine.path, ServerOptions(repository=repository)) as server,
            Client(server.address) as client,
        ):
            text = [texts(client, question, arguments.output_tokens) for question in questions]
            images = [new_images(client, questions[0], size)]
            for once in (*text, *images):
                once(threading.Event())  # warm
            tokens_alone = sum(rates(text, arguments.seconds))
            images_alone = sum(rates(images, arguments.seconds))
            *tokens, both_images = rates([*text, *images], arguments.seconds)
            return {
                TOKENS: tokens_alone,
                IMAGES: images_alone,
                BESIDE.format(TOKENS): sum(tokens),
                BESIDE.format(IMAGES): both_images,
                SHARES: sum(tokens) / tokens_alone + both_images / images_alone,
            }

    return measure


Work = Callable[[threading.Event], float]  # does one request, unless told to stop; returns how much was done


def texts(client: Client, question: str, tokens: int) -> Work:
    def once(stop: threading.Event) -> float:
        done = 0
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
        for delta in client.stream(question, sampling=sampling):
            done += len(delta.token_ids)
            if stop.is_set():
                break  # which cancels the request
        return done

    return once


def new_images(client: Client, question: str, size: ImageSize) -> Work:
    """The work of an image: its encoding and one prefill."""

    def once(stop: threading.Event) -> float:
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        for _ in client.stream(question, images=[new_image(size)], sampling=sampling):
            pass
        return 1.0

    return once


def rates(works: Sequence[Work], seconds: float) -> list[float]:
    """Let each work go on for `seconds`, all at once. Returns how much of each was done per second, counting until the
    end of its last request."""
    stop = threading.Event()

    def repeat(work: Work) -> float:
        started, done = time.perf_counter(), 0.0
        while not stop.is_set():
            done += work(stop)
        return done / (time.perf_counter() - started)

    with ThreadPoolExecutor(len(works)) as users:
        running = [users.submit(repeat, work) for work in works]
        time.sleep(seconds)
        stop.set()
        return [each.result() for each in running]


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
