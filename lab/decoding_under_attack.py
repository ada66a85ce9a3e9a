"""Measures how long requests wait while a server decodes images that were made to take a decoder long.

    python -m lab.decoding_under_attack --work WORK

`--attackers` clients each send such a file (`--bomb` names its format), and again when the server has refused it.
TTFT is that of single requests beside them, the median of `--repeats` in each round: text, an image in the cache, and a
new image of `--image-size`. The same server answers the same requests alone in turn. The attackers run on the same
cores; their share is small, because they wait for the server.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from lab.bombs import BOMBS
from lab.common import parser, run
from lab.engines import random_engine
from lab.images import ImageSize, new_image
from lab.rounds import Contender, Rounds
from lab.spread import Spread
from nvlm_trt.api import SamplingParams
from nvlm_trt.errors import NvlmError
from nvlm_trt.image.decoding import ImageLimits
from nvlm_trt.serving.client import Client
from nvlm_trt.serving.triton.repository import RepositoryOptions
from nvlm_trt.serving.triton.server import ServerOptions, TritonServer

RESULT = "decoding_under_attack.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "numpy", "Pillow", "tritonclient", "nvidia-pytriton")
TEXT, CACHED, NEW = "TTFT of text ms", "TTFT of a cached image ms", "TTFT of a new image ms"
LONGEST = "longest TTFT of a new image ms"
ALONE, ATTACKED = "alone", "attacked"
_SETTLING_SECONDS = 2.0  # until all attackers have sent their first file


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-tiny")
    made.add_argument("--precision", default="fp32")
    made.add_argument("--attackers", type=int, default=20)
    made.add_argument("--bomb", choices=list(BOMBS), default="JPEG")
    made.add_argument("--image-size", default="448x448", help="WIDTHxHEIGHT")
    made.add_argument("--max-decode-seconds", type=float, default=ImageLimits().max_decode_seconds)
    made.add_argument("--repeats", type=int, default=5, help="measurements of every TTFT in a round")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    size = ImageSize.parse(arguments.image_size, "--image-size")
    engine = random_engine(arguments.work, arguments.preset, arguments.precision)
    bombs = [BOMBS[arguments.bomb](seed) for seed in range(arguments.attackers)]
    limits = ImageLimits(max_decode_seconds=arguments.max_decode_seconds)
    served = ServerOptions(repository=RepositoryOptions(threads=arguments.threads, image_limits=limits))
    with TritonServer(engine.path, served) as server, Client(server.address) as client:
        contenders: dict[str, Contender] = {
            ALONE: lambda: first_tokens(client, size, arguments.repeats),
            ATTACKED: lambda: attacked(server.address, bombs, client, size, arguments.repeats),
        }
        rounds.run(contenders, arguments.rounds)
        server.check()
    rounds.report(more_ttft_ms={metric: str(more(rounds, metric)) for metric in (TEXT, CACHED, NEW)})
    for metric in (TEXT, CACHED, NEW):
        print(f"{metric}: attacked {more(rounds, metric)} more")


def more(rounds: Rounds, metric: str) -> Spread:
    """Subtracts the time alone from the time under attack, within the rounds."""
    pairs = zip(rounds.values[ATTACKED][metric], rounds.values[ALONE][metric], strict=True)
    return Spread.of([attacked - alone for attacked, alone in pairs])


def attacked(
    address: str, bombs: Sequence[bytes], client: Client, size: ImageSize, repeats: int
) -> Mapping[str, float]:
    with attack(address, bombs):
        time.sleep(_SETTLING_SECONDS)
        return first_tokens(client, size, repeats)


@contextlib.contextmanager
def attack(address: str, bombs: Sequence[bytes]) -> Iterator[None]:
    """Keeps one request per bomb in flight during a `with` block."""
    stopping = threading.Event()
    with Client(address) as client:
        attackers = [threading.Thread(target=send_again, args=(client, bomb, stopping)) for bomb in bombs]
        for attacker in attackers:
            attacker.start()
        try:
            yield
        finally:
            stopping.set()
            client.close()  # cancels what is in flight
            for attacker in attackers:
                attacker.join()


def send_again(client: Client, bomb: bytes, stopping: threading.Event) -> None:
    while not stopping.is_set():
        with contextlib.suppress(NvlmError, ValueError):  # refused, or the client is closed
            list(client.stream("What is this?", images=[bomb], sampling=SamplingParams(max_tokens=1)))


def first_tokens(client: Client, size: ImageSize, repeats: int) -> Mapping[str, float]:
    times: dict[str, list[float]] = {TEXT: [], CACHED: [], NEW: []}
    cached = new_image(size)
    ttft(client, [cached])
    for _ in range(repeats):
        for metric, images in ((TEXT, []), (CACHED, [cached]), (NEW, [new_image(size)])):
            times[metric].append(1e3 * ttft(client, images))
    return {**{metric: statistics.median(found) for metric, found in times.items()}, LONGEST: max(times[NEW])}


def ttft(client: Client, images: Sequence[bytes]) -> float:
    """Returns the seconds until the first token of an answer."""
    started = time.perf_counter()
    stream = client.stream("What is this?", images=images, sampling=SamplingParams(max_tokens=2, ignore_eos=True))
    next(stream)
    took = time.perf_counter() - started
    list(stream)
    return took


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
