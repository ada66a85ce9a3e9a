"""Makes values of JSON, right and wrong: sampling parameters, messages, and nesting."""

from __future__ import annotations

import json
import random
from typing import Any

from lab.reliability.texts import broken, plain, text

_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -0.0,
    -1,
    1,
    0.5,
    1e-320,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63,
    2**64,
    10**400,
    "",
    "1",
    "nan",
    [],
    {},
    [None],
    {"a": 1},
    [[[[]]]],
)
MOST_TOKENS = 6  # of a valid request, so that a run asks many


def odd(source: random.Random) -> Any:
    """Chooses a value that is seldom right."""
    if source.random() < 0.2:
        return text(source)
    return source.choice(_ODD)


def valid_sampling(source: random.Random) -> dict[str, Any]:
    """Chooses allowed values for some parameters."""
    choices: dict[str, Any] = {
        "temperature": source.choice((0, 0.0, 0.7, 1, 100)),
        "top_k": source.choice((0, 1, 5, 10**6)),
        "top_p": source.choice((1, 1.0, 0.5, 1e-9)),
        "min_p": source.choice((0, 0.1, 1)),
        "repetition_penalty": source.choice((1, 1.1, 0.01, 100)),
        "presence_penalty": source.choice((0, 2, -2.0)),
        "frequency_penalty": source.choice((0, 0.5, -2)),
        "logit_bias": source.choice(({}, {"65": -100}, {"0": 100, "511": 0.5})),
        "min_tokens": source.choice((0, 1)),
        "seed": source.choice((None, 0, 7, 2**64 - 1)),
        "stop": source.choice(([], ["x"], "stop", ["\n", "ä", "🙂"], ["a" * 256])),
        "logprobs": source.choice((0, 1, 20)),
        "ignore_eos": source.choice((True, False)),
    }
    chosen = {name: value for name, value in choices.items() if source.random() < 0.3}
    return {"max_tokens": source.randint(1, MOST_TOKENS), **chosen}


_CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"json_object": True},
    {"choice": ["yes", "no"]},
    {"choice": []},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"type": "integer", "multipleOf": 1_000_003}},
    {"regex": "a{100000000}"},
    {"regex": "(a{40}){40}", "json_object": True},
)


def sampling(source: random.Random) -> Any:
    """Chooses parameters of which some are wrong."""
    values = valid_sampling(source)
    for _ in range(source.randrange(1, 4)):
        name = source.choice((*values, "top_k", "temperature", "stop", "seed", "max_tokens", "n", "", text(source, 12)))
        values[name] = odd(source)
    if source.random() < 0.1:
        return odd(source)
    if source.random() < 0.1:
        values["stop"] = [text(source)] * source.choice((1, 16, 17, 1000))
    if source.random() < 0.1:
        values["constraint"] = source.choice((*_CONSTRAINTS, {"regex": text(source)}, odd(source)))
    return values


def messages(source: random.Random) -> Any:
    """Makes a conversation whose turns, roles and parts are partly wrong."""
    turns: list[Any] = []
    for _ in range(source.choice((0, 1, 1, 2, 3, 5))):
        role = source.choice(("system", "user", "user", "assistant", "tool", "", None, 1))
        turns.append({"role": role, "content": content(source)})
    if turns and source.random() < 0.2:
        turns[source.randrange(len(turns))] = odd(source)
    if turns and source.random() < 0.2 and isinstance(turns[0], dict):
        turns[0][text(source, 12)] = odd(source)
    return turns if source.random() < 0.95 else odd(source)


def valid_messages(source: random.Random) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": plain(source)}]
    if source.random() < 0.5:
        turns += [{"role": "assistant", "content": plain(source)}, {"role": "user", "content": plain(source)}]
    if source.random() < 0.3:
        turns.insert(0, {"role": "system", "content": plain(source)})
    return turns


def content(source: random.Random) -> Any:
    choice = source.randrange(6)
    if choice == 0:
        return odd(source)
    if choice == 1:
        kinds = ("text", "image", "image_url", "", None, 5)
        return [{"type": source.choice(kinds), "text": text(source)} for _ in range(source.randrange(4))]
    return broken(source) if choice == 2 else text(source)


def nested(source: random.Random, depth: int) -> bytes:
    """Writes JSON of lists or objects within each other, closed or not."""
    opening, closing = source.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opening * depth + source.choice((b"1" + closing * depth, b"", b"1"))


def dumped(value: Any) -> bytes:
    """Writes JSON as UTF-8; halves of surrogate pairs become bytes that are none."""
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")
