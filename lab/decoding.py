"""Defines greedy decoding of given prompts: the contract, the prompts, and the options of benchmarks that time it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lab.common import parser
from nvlm_trt.engine import Engine

# prompts [batch, tokens], steps, the image placeholder (never sampled)
# -> seconds of the steps, tokens [batch, 1 + steps]
Decode = Callable[[np.ndarray, int, int], tuple[float, np.ndarray]]


def decoding_parser(doc: str | None, rounds: int, precisions: Sequence[str]) -> argparse.ArgumentParser:
    """Makes a parser with the options of a benchmark of decoding."""
    options = parser(doc, rounds)
    options.add_argument("--preset", default="nvlm-d-small")
    options.add_argument("--precisions", nargs="+", default=precisions)
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--steps", type=int, default=16)
    options.add_argument("--peers", type=Path, help="python of the peers' environment [WORK/peers/bin/python]")
    return options


def prepare(arguments: argparse.Namespace) -> tuple[Path, dict[str, Engine]]:
    """Returns the checkpoint and its engines by precision."""
    import torch

    from lab.engines import random_checkpoint, random_engine

    torch.set_num_threads(arguments.threads)
    checkpoint = random_checkpoint(arguments.work, arguments.preset)
    return checkpoint, {name: random_engine(arguments.work, arguments.preset, name) for name in arguments.precisions}


def prompts(batch: int, tokens: int) -> np.ndarray:
    """Makes prompts [batch, tokens] int64, the same in every run: bytes, which every vocabulary has."""
    return np.random.default_rng(0).integers(0, 256, (batch, tokens), dtype=np.int64)


def image_placeholder(engine: Engine) -> int:
    token = engine.config.image_token_id
    assert token is not None, "an engine's config names its image placeholder"
    return token
