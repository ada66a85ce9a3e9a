"""Decode speed of an engine against transformers on the same weights, in one run, interleaved.

    python benchmarks/decode_vs_transformers.py --work /tmp/nvlm-bench --json benchmarks/results/decode.json

Both sides decode greedily after the same prompt. Every round times each contender once, in turn, so that a noisy
machine disturbs all of them alike; medians over the rounds and their ratio are reported, with the spread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
from pathlib import Path

import numpy as np
import torch
import transformers
from common import built_engine, random_checkpoint
from decode_peers import Decode, engine_decoder, transformers_decoder
from transformers_model import language_model

from nvlm_trt.backends import open_backend

OURS = "nvlm-trt"
PRECISIONS = ("fp32", "int8", "int8-weight-only", "int4-weight-only")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    engines = {name: built_engine(arguments.work, arguments.preset, name) for name in PRECISIONS}
    # bytes: every vocabulary has them
    ids = np.random.default_rng(0).integers(0, 256, (arguments.batch, arguments.prompt_tokens), dtype=np.int64)
    with contextlib.ExitStack() as opened:
        decoders: dict[str, Decode] = {}
        for precision, engine in engines.items():
            backend = opened.enter_context(open_backend(engine, components=("decoder",), threads=arguments.threads))
            decoders[f"{OURS} {precision}"] = engine_decoder(backend)
        model = language_model(random_checkpoint(arguments.work, arguments.preset))
        for attention in ("eager", "sdpa"):
            for cache in ("dynamic", "static"):
                decoders[f"transformers {attention}/{cache}"] = transformers_decoder(model, attention, cache)
        image_token = next(iter(engines.values())).config.image_token_id
        rates: dict[str, list[float]] = {name: [] for name in decoders}
        for round_number in range(arguments.rounds + 1):
            for name, decode in decoders.items():
                rate = arguments.batch * arguments.steps / decode(ids, arguments.steps, image_token)[0]
                if round_number:  # round 0 warms up
                    rates[name].append(rate)
                print(f"round {round_number}: {name:32s} {rate:7.2f} tokens/s", flush=True)
    report(arguments, rates)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps the checkpoint and the engine between runs")
    parser.add_argument("--preset", default="nvlm-d-small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the numbers here")
    return parser.parse_args()


def report(arguments: argparse.Namespace, rates: dict[str, list[float]]) -> None:
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max((name for name in medians if not name.startswith(OURS)), key=medians.__getitem__)
    ratios = {name: medians[name] / medians[best] for name in medians if name.startswith(OURS)}
    result = {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "prompt_tokens": arguments.prompt_tokens,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "tokens_per_s": {
            name: {"median": medians[name], "min": min(values), "max": max(values)} for name, values in rates.items()
        },
        "best_transformers": best,
        "ratios": ratios,
    }
    for name, values in rates.items():
        print(f"{name:32s} median {medians[name]:7.2f} tokens/s ({min(values):.2f} to {max(values):.2f})")
    for name, ratio in ratios.items():
        print(f"{name} is {ratio:.2f}x {best}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
