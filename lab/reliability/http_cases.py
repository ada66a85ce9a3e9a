"""Makes requests over HTTP: those of `generate` and `generate_stream`, and some that no client of ours sends."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from lab.reliability import values
from lab.reliability.mutations import mutate
from lab.reliability.request_case import ANSWER, RequestCase
from lab.reliability.texts import plain, text
from lab.reliability.valid_files import valid_files

_STREAM, _SINGLE = "/v2/models/nvlm/generate_stream", "/v2/models/nvlm/generate"
_PATHS = (
    "/v2/models/nvlm/infer",
    "/v2/models/nvlm/versions/1/generate",
    "/v2/models/nvlm/versions/9/generate",
    "/v2/models/tiling/infer",
    "/v2/models/absent/generate",
    "/v2/models/nvlm",
    "/v2/nothing",
    "/",
    "/v2/models/" + "x" * 1000,  # tritonserver closes the connection at some of 5,000
    "/%00/%ff",
)
# RapidJSON, in tritonserver, reads JSON recursively. Deeper nesting is in lab.reliability.kinds.foreign: it ends
# tritonserver 2.51, which is no finding about the product.
_DEEPEST = 400


def _valid(source: random.Random) -> RequestCase:
    sampling = values.valid_sampling(source)
    sampling.pop("logprobs", None)
    body: dict[str, Any] = {"prompt": plain(source), "sampling_parameters": json.dumps(sampling, ensure_ascii=False)}
    if source.random() < 0.3:
        files = [file for file in valid_files() if file.read]
        body["image"] = [base64.b64encode(source.choice(files).data).decode()]
    return RequestCase("a valid request over HTTP", path=_STREAM, body=values.dumped(body), expected=ANSWER)


def _odd_values(source: random.Random) -> RequestCase:
    body: dict[str, Any] = {
        "prompt": source.choice((plain(source), text(source), values.odd(source))),
        "sampling_parameters": source.choice((json.dumps(values.sampling(source)), values.odd(source))),
    }
    if source.random() < 0.3:
        body["messages"] = source.choice((json.dumps(values.messages(source)), values.messages(source)))
    if source.random() < 0.3:
        body["image"] = source.choice(
            (values.odd(source), base64.b64encode(source.randbytes(50)).decode(), [text(source)] * 3)
        )
    if source.random() < 0.3:
        body["max_tiles"] = values.odd(source)
    if source.random() < 0.2:
        body[text(source, 12)] = values.odd(source)
    path = source.choice((_STREAM, _STREAM, _SINGLE))
    return RequestCase("odd values over HTTP", path=path, body=values.dumped(body), take=20, ours=False)


def _damaged(source: random.Random) -> RequestCase:
    whole = values.dumped({"prompt": plain(source), "sampling_parameters": '{"max_tokens": 2}'})
    body = source.choice(
        (
            mutate(source, whole, b'{"max_tiles": 1}')[0],
            values.nested(source, source.choice((10, _DEEPEST))),
            source.randbytes(200),
            b"",
        )
    )
    return RequestCase("damaged JSON over HTTP", path=_STREAM, body=body, take=20, ours=False)


def _elsewhere(source: random.Random) -> RequestCase:
    body = source.choice((values.dumped({"prompt": "Hello"}), b"", source.randbytes(60), _infer(source)))
    return RequestCase("another path over HTTP", path=source.choice(_PATHS), body=body, take=20, ours=False)


def _infer(source: random.Random) -> bytes:
    """Writes a request of the inference protocol."""
    inputs = [
        {
            "name": source.choice(("prompt", "image", "other")),
            "datatype": source.choice(("BYTES", "FP32", "x")),
            "shape": source.choice(([1], [], [-1], [2, 2], "x")),
            "data": source.choice((["Hello"], [], [1], None, "x")),
        }
    ]
    return values.dumped({"inputs": inputs})


HTTP_KINDS: Sequence[Callable[[random.Random], RequestCase]] = (_valid, _odd_values, _odd_values, _damaged, _elsewhere)
