"""Compares decoding speeds of NVLM-D's language model: our precisions, transformers, llama.cpp and OpenVINO, in turn.

    lab/peers/install.sh WORK/peers
    python -m lab.decode_peers --work WORK

All contenders have the same random weights and continue the same prompts greedily, text only. transformers runs its own
Qwen2 in fp32 and bf16 with each of its attention modes and caches. llama.cpp (Q8_0) and OpenVINO (8-bit weights, the
language model as optimum-intel converts it) run in an environment of their own, because their packages need other
versions than ours; without that environment they are skipped. llama.cpp and OpenVINO keep their default KV caches; ours
is fp32.
The result says how many of the first two tokens of every sequence are those of transformers in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from lab.common import run
from lab.decoding import Decode, decoding_parser, image_placeholder, prepare, prompts
from lab.rounds import Contender, Rounds

RESULT = "decode_peers.json"
DTYPES = ("fp32", "bf16")
COMPARED = 2  # tokens of every sequence


def options() -> argparse.ArgumentParser:
    made = decoding_parser(__doc__, 7, ["fp32", "int8", "int8-weight-only", "int4-weight-only"])
    made.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="transformers' types")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    from lab.decoders import engine_decoder, transformers_decoder
    from lab.peers.client import open_peers
    from lab.transformers_model import TORCH_DTYPES, language_model
    from nvlm_trt.backends.opening import open_backend

    checkpoint, engines = prepare(arguments)
    with contextlib.ExitStack() as opened:
        decoders: dict[str, Decode] = {}
        for precision, engine in engines.items():
            backend = opened.enter_context(open_backend(engine, stages=("decoder",), threads=arguments.threads))
            decoders[f"nvlm-trt {precision}"] = engine_decoder(backend)
        models = {dtype: language_model(checkpoint, TORCH_DTYPES[dtype]) for dtype in arguments.dtypes}
        for dtype, attention, cache in itertools.product(models, ("eager", "sdpa"), ("dynamic", "static")):
            name = f"transformers {dtype} {attention}/{cache}"
            decoders[name] = transformers_decoder(models[dtype], attention, cache)
        peers, notes = open_peers(arguments, checkpoint, opened)
        decoders |= {name: peer.decode for name, peer in peers.items()}
        placeholder = image_placeholder(next(iter(engines.values())))
        tokens: dict[str, np.ndarray] = {}
        contenders = {
            name: contender(decoder, arguments, placeholder, partial(tokens.__setitem__, name))
            for name, decoder in decoders.items()
        }
        rounds.add_versions({name: peer.version for name, peer in peers.items()})
        rounds.run(contenders, arguments.rounds)
    metrics = [metric_of(batch) for batch in arguments.batches]
    baselines = [rounds.best(metric, "transformers", largest=True) for metric in metrics]
    ratios = [
        (metric, f"nvlm-trt {precision}", baseline)
        for precision in engines
        for metric, best in zip(metrics, baselines, strict=True)
        for baseline in (best, *peers)
        if baseline
    ]
    others: dict[str, Any] = {"notes": notes, "peers": {name: peer.version for name, peer in peers.items()}}
    if reference := next((name for name in tokens if name.startswith("transformers fp32")), None):
        others["first_tokens_as_transformers_fp32"] = {
            name: float(np.mean(answer == tokens[reference])) for name, answer in tokens.items()
        }
        print(f"first tokens as {reference}: {others['first_tokens_as_transformers_fp32']}")
    rounds.report(ratios, skipped=notes, **others)


def metric_of(batch: int) -> str:
    return f"batch {batch} tokens/s"


def contender(
    decode: Decode, arguments: argparse.Namespace, placeholder: int, on_tokens: Callable[[np.ndarray], None]
) -> Contender:
    """Times every batch size once. `on_tokens` gets the first tokens [sequences, COMPARED] of the largest batch."""

    def measure() -> Mapping[str, float]:
        measured = {}
        for batch in sorted(arguments.batches):
            seconds, tokens = decode(prompts(batch, arguments.prompt_tokens), arguments.steps, placeholder)
            assert tokens.shape == (batch, arguments.steps + 1), tokens.shape
            measured[metric_of(batch)] = batch * arguments.steps / seconds
        on_tokens(tokens[:, :COMPARED])
        return measured

    return measure


if __name__ == "__main__":
    run(options(), measure, RESULT)
