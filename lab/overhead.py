"""What the two benchmarks of overhead share: their options, their questions, and the difference within rounds."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from lab.common import parser
from lab.rounds import Rounds
from lab.spread import Spread
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.prompt.tokenizer import Tokenizer


def overhead_options(doc: str | None, requests: int) -> argparse.ArgumentParser:
    made = parser(doc, rounds=7)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--precision", default="int8-weight-only")
    made.add_argument("--concurrency", type=int, default=8)
    made.add_argument("--requests", type=int, default=requests, help="requests per round, for the throughput")
    made.add_argument("--prompt-tokens", type=int, default=64)
    made.add_argument("--output-tokens", type=int, default=64)
    made.add_argument("--image-size", default="448x448", help="WIDTHxHEIGHT")
    made.add_argument("--repeats", type=int, default=5, help="measurements of every TTFT in a round")
    return made


def write_questions(engine: Path, arguments: argparse.Namespace) -> list[str]:
    """Writes as many questions as a round has requests, of as many tokens as the options say."""
    writer, rng = PromptWriter(Tokenizer.from_directory(engine)), np.random.default_rng(0)
    return [writer.write(arguments.prompt_tokens, rng) for _ in range(arguments.requests)]


def more(rounds: Rounds, metric: str, contender: str, base: str) -> Spread:
    """Subtracts a metric of `base` from that of `contender`, within the rounds."""
    pairs = zip(rounds.values[contender][metric], rounds.values[base][metric], strict=True)
    return Spread.of([one - other for one, other in pairs])
