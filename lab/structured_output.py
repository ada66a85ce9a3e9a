"""Measures structured output: what a constraint costs by itself, and what requests beside it notice.

    python -m lab.structured_output --work WORK

Compiling, masks and drawing are measured with a vocabulary of 129,000 tokens, that of the tokenizer which the package
litellm contains, and a schema of a bill; the logits are random. A compilation includes its trial in another process; a
mask includes accepting its token. Neighbours are half of `--concurrency` requests to one engine in this process: the
other half has no constraint (FREE), is bound to a schema (BOUND), or has none while constraints that take the whole
budget of a trial are refused one after the other (REFUSED). The neighbours have to give the same texts in all three.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lab.common import parser, run
from lab.engines import random_engine
from lab.rounds import Contender, Rounds
from nvlm_trt.api import ChatRequest, Constraint, Message, SamplingParams
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.errors import NvlmError, ParameterError
from nvlm_trt.prompt.tokenizer import Tokenizer, format_tokens
from nvlm_trt.runtime.grammar import Grammars
from nvlm_trt.runtime.pipeline import Pipeline
from nvlm_trt.runtime.sampling import Sampler

RESULT = "structured_output.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "numpy", "llguidance", "litellm")
ITSELF, FREE, BOUND, REFUSED = "a constraint", "neighbours, FREE", "neighbours, BOUND", "neighbours, REFUSED"
INTER_TOKEN, TOKENS = "inter-token ms", 400

ITEM = {
    "type": "object",
    "properties": {"what": {"type": "string"}, "price": {"type": "number"}, "unit": {"enum": ["piece", "kg"]}},
    "required": ["what", "price", "unit"],
    "additionalProperties": False,
}
BILL = {
    "type": "object",
    "properties": {
        "shop": {"type": "string"},
        "date": {"type": "string", "format": "date"},
        "items": {"type": "array", "items": ITEM},
        "total": {"type": "number", "minimum": 0},
    },
    "required": ["shop", "date", "items", "total"],
    "additionalProperties": False,
}
ENDLESS = {**BILL, "properties": {**BILL["properties"], "shop": {"type": "string", "minLength": 100_000}}}  # type: ignore[dict-item]


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=5)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precision", default="int8-weight-only")
    made.add_argument("--concurrency", type=int, default=8)
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--output-tokens", type=int, default=64)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    engine = random_engine(arguments.work, arguments.preset, arguments.precision)
    writer, rng = PromptWriter(Tokenizer.from_directory(engine.path)), np.random.default_rng(0)
    questions = [writer.write(arguments.prompt_tokens, rng) for _ in range(arguments.concurrency)]
    texts: dict[str, list[str]] = {}
    with Pipeline.open(engine.path, threads=arguments.threads) as pipeline:
        contenders: dict[str, Contender] = {ITSELF: by_itself}
        for name in (FREE, BOUND, REFUSED):
            contenders[name] = neighbours(pipeline, questions, arguments.output_tokens, name, texts)
        rounds.run(contenders, arguments.rounds)
    assert texts[FREE] == texts[BOUND] == texts[REFUSED], "a constraint changed the answers of its neighbours"
    rounds.report([(INTER_TOKEN, BOUND, FREE), (INTER_TOKEN, REFUSED, FREE)])


# --- a constraint by itself ------------------------------------------------------------------------------------------


def large_tokenizer() -> Tokenizer:
    found = importlib.util.find_spec("litellm")  # importing it would ask the network
    if found is None or found.origin is None:
        raise NvlmError("the large tokenizer is a file of litellm; install with: pip install 'nvlm-trt[test]'")
    file = Path(found.origin).parent / "litellm_core_utils" / "tokenizers" / "deepseek_tokenizer.json"
    raw = tokenizers.Tokenizer.from_file(str(file))
    raw.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in format_tokens(6)])
    return Tokenizer(raw)


def by_itself() -> Mapping[str, float]:
    tokenizer = large_tokenizer()
    vocab_size = tokenizer.vocab_size
    grammars, started = Grammars(tokenizer, vocab_size), time.perf_counter()
    grammars.prepare()
    prepared = time.perf_counter() - started
    grammars.compile(Constraint(regex="a"))  # starts the process of the trial
    compiled = milliseconds(lambda: grammars.compile(Constraint(json_schema=BILL)))
    again = milliseconds(lambda: grammars.compile(Constraint(json_schema=BILL)))
    grammar = grammars.compile(Constraint(json_schema=BILL))
    grammars.close()
    random = np.random.default_rng(0)
    logits = random.normal(size=(16, vocab_size)).astype(np.float32)
    masks: list[float] = []
    state = grammar.start()
    for _ in range(TOKENS):
        state = grammar.start() if state.is_complete else state
        begun = time.perf_counter()
        state.allows(0)
        computed = time.perf_counter() - begun
        token = int(random.choice(np.flatnonzero(state.allowed())))
        begun = time.perf_counter()
        state.accept(token)
        masks.append(computed + time.perf_counter() - begun)
    draws = {
        f"{kind} step{bound} us": drawing(SamplingParams(temperature=temperature, seed=0), logits, of)
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0))
        for bound, of in (("", None), (", bound", grammar))
    }
    return {
        "prepare s": prepared,
        "compile ms": compiled,
        "compile again ms": again,
        "mask us": 1e6 * statistics.mean(masks),
        "slowest mask us": 1e6 * max(masks),
        **draws,
    }


def drawing(params: SamplingParams, logits: Any, grammar: Any) -> float:
    """Returns the mean microseconds to draw a token from logits [n, vocab], mask and check included."""
    state = grammar.start() if grammar else None
    sampler = Sampler(params, np.empty(0, np.int64), grammar=state)
    begun = time.perf_counter()
    for index in range(TOKENS):
        if state is not None and state.is_complete:
            state = grammar.start()
            sampler = Sampler(params, np.empty(0, np.int64), grammar=state)
        sampler.sample(logits[index % len(logits)])
    return 1e6 * (time.perf_counter() - begun) / TOKENS


def milliseconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


# --- its neighbours --------------------------------------------------------------------------------------------------


def neighbours(
    pipeline: Pipeline, questions: Sequence[str], tokens: int, name: str, texts: dict[str, list[str]]
) -> Contender:
    """Times the first half of the requests. `texts` gets their answers under `name`."""
    free = SamplingParams(tokens, ignore_eos=True)
    bound = SamplingParams(tokens, constraint=Constraint(json_schema=ENDLESS)) if name == BOUND else free

    def measure_once() -> Mapping[str, float]:
        half = len(questions) // 2
        sampling = [free] * half + [bound] * (len(questions) - half)
        chats = [ChatRequest([Message("user", q)], sampling=s) for q, s in zip(questions, sampling, strict=True)]
        others = refused_constraints(pipeline) if name == REFUSED else nullcontext()
        with others, ThreadPoolExecutor(len(chats)) as users:
            timed = list(users.map(lambda chat: timed_answer(pipeline, chat), chats))[:half]
        texts[name] = [text for text, _ in timed]
        return {INTER_TOKEN: 1e3 * statistics.median(seconds for _, seconds in timed)}

    return measure_once


def timed_answer(pipeline: Pipeline, chat: ChatRequest) -> tuple[str, float]:
    """Returns an answer, and the mean seconds between its tokens."""
    text, moments = "", []
    for delta in pipeline.generate(chat):
        text += delta.text
        moments.append(time.perf_counter())
    return text, (moments[-1] - moments[0]) / (len(moments) - 1)


@contextmanager
def refused_constraints(pipeline: Pipeline) -> Any:
    """Sends constraints whose trial takes its whole budget of time, one after the other, until the end of the block."""
    over = threading.Event()

    def send() -> None:
        number = 1_000_003
        while not over.is_set():
            hostile = Constraint(json_schema={"type": "integer", "multipleOf": number})
            try:
                list(
                    pipeline.generate(ChatRequest([Message("user", "Hi")], sampling=SamplingParams(constraint=hostile)))
                )
            except ParameterError:
                number += 2
            else:
                raise AssertionError("the constraint was not refused")

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
