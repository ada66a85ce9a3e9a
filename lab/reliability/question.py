"""Makes the requests of the soak: each asks a question whose greedy answer has to stay the same."""

from __future__ import annotations

import base64
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lab.reliability.load import small_image

GRPC, HTTP = "gRPC", "HTTP"
_WORDS = ("total", "date", "order", "tax", "number", "name", "street", "page", "sum", "line", "price", "unit")
_TEXTS, _IMAGES = 24, 6
_LONG_WORDS = 250


@dataclass(frozen=True)
class SoakQuestion:
    """Holds one request. Questions of one `key` have one answer, however they are sent."""

    kind: str
    key: str
    prompt: str
    images: tuple[bytes, ...] = ()
    max_tokens: int = 24
    transport: str = GRPC
    leaves_after: int | None = None  # deltas after which the client leaves
    wrong: bool = False  # has to be refused

    @property
    def sampling(self) -> dict[str, object]:
        if self.wrong:
            return {"max_tokens": self.max_tokens, "temperature": -1}
        return {"max_tokens": self.max_tokens, "ignore_eos": True}

    @property
    def body(self) -> bytes:
        """Writes the request for HTTP."""
        values: dict[str, object] = {"prompt": self.prompt, "sampling_parameters": json.dumps(self.sampling)}
        if self.images:
            values["image"] = [base64.b64encode(image).decode() for image in self.images]
        return json.dumps(values).encode()


def questions(seed: int) -> Iterator[SoakQuestion]:
    """Yields requests without end. Every kind comes as often in every stretch of time, so latencies compare."""
    source = random.Random(f"{seed} soak")
    texts = [_sentence(source, 10) for _ in range(_TEXTS)]
    for number in itertools.count():
        yield KINDS[number % len(KINDS)](source, texts, number)


def _sentence(source: random.Random, words: int) -> str:
    return " ".join(source.choice(_WORDS) for _ in range(words))


def _text(source: random.Random, texts: Sequence[str], number: int) -> SoakQuestion:
    prompt = source.choice(texts)
    return SoakQuestion("text", prompt, prompt)


def _http(source: random.Random, texts: Sequence[str], number: int) -> SoakQuestion:
    prompt = source.choice(texts)
    return SoakQuestion("text over HTTP", prompt, prompt, transport=HTTP)


def _long(source: random.Random, texts: Sequence[str], number: int) -> SoakQuestion:
    prompt = " ".join([source.choice(texts[:4]), *(_WORDS[i % len(_WORDS)] for i in range(_LONG_WORDS))])
    return SoakQuestion("long prompt", prompt, prompt)


def _cached(source: random.Random, texts: Sequence[str], number: int) -> SoakQuestion:
    image = source.randrange(_IMAGES)
    transport = source.choice((GRPC, HTTP))
    return SoakQuestion("cached image", f"image {image}", "What is this?", (small_image(image),), transport=transport)


def _new(source: random.Random, texts: Sequence[str], number: int) -> SoakQuestion:
    """Asks about pixels that were asked about before, in a file that no cache knows."""
    image = source.randrange(_IMAGES)
    file = small_image(image) + number.to_bytes(8, "big")  # Pillow ignores what follows the end of a PNG
    return SoakQuestion("new image", f"image {image}", "What is this?", (file,))


def _several(source: random.Random, texts: Sequence[str], number: int) -> SoakQuestion:
    first = source.randrange(_IMAGES)
    chosen = [first, (first + 1) % _IMAGES, (first + 2) % _IMAGES]
    images = tuple(small_image(image) for image in chosen)
    return SoakQuestion("three images", f"images {chosen}", "Compare them.", images, max_tokens=12)


def _cancelled(source: random.Random, texts: Sequence[str], number: int) -> SoakQuestion:
    prompt = source.choice(texts)
    return SoakQuestion("cancelled", f"long {prompt}", prompt, max_tokens=400, leaves_after=source.randint(1, 20))


def _wrong(source: random.Random, texts: Sequence[str], number: int) -> SoakQuestion:
    transport = source.choice((GRPC, HTTP))
    return SoakQuestion("wrong request", "wrong", source.choice(texts), transport=transport, wrong=True)


KINDS: Sequence[Callable[[random.Random, Sequence[str], int], SoakQuestion]] = (
    _text,
    _cached,
    _http,
    _new,
    _cancelled,
    _text,
    _long,
    _several,
    _wrong,
    _http,
)
