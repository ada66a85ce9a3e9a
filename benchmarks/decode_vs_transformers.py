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
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache

from nvlm_trt.backends import open_backend
from nvlm_trt.backends.base import Backend
from nvlm_trt.builders.onnx_engine import QuantizationOptions, build_engine
from nvlm_trt.checkpoint import Checkpoint
from nvlm_trt.config import LlmConfig
from nvlm_trt.engine import Engine
from nvlm_trt.random_checkpoint import init_checkpoint

OURS = "nvlm-trt"
PRECISIONS = ("fp32", "int8", "int8-weight-only", "int4-weight-only")

Contender = Callable[[int], float]  # decode steps -> seconds


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    checkpoint, engines = prepare(arguments)
    llm = next(iter(engines.values())).config.llm
    rng = np.random.default_rng(0)
    ids = rng.integers(0, llm.vocab_size - 1000, (arguments.batch, arguments.prompt_tokens), dtype=np.int64)
    with contextlib.ExitStack() as opened:
        contenders: dict[str, Contender] = {}
        for precision, engine in engines.items():
            backend = opened.enter_context(open_backend(engine, components=("decoder",), threads=arguments.threads))
            contenders[f"{OURS} {precision}"] = engine_decoder(backend, ids)
        model = transformers_model(checkpoint, llm)
        for attention in ("eager", "sdpa"):
            for cache in ("dynamic", "static"):
                contenders[f"transformers {attention}/{cache}"] = transformers_decoder(model, ids, attention, cache)
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for round_number in range(arguments.rounds + 1):
            for name, run in contenders.items():
                rate = arguments.batch * arguments.steps / run(arguments.steps)
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


def prepare(arguments: argparse.Namespace) -> tuple[Path, dict[str, Engine]]:
    checkpoint = arguments.work / "checkpoints" / arguments.preset
    if not checkpoint.exists():
        init_checkpoint(checkpoint, arguments.preset, seed=0)
    engines = {}
    for precision in PRECISIONS:
        output = arguments.work / "engines" / f"{arguments.preset}-{precision}"
        if not output.exists():
            # speed does not depend on the scales, so a few samples of random weights will do
            quantization = QuantizationOptions(calibration_samples=14, gate=None)
            build_engine(checkpoint, output, precision=precision, quantization=quantization)
        engines[precision] = Engine.open(output)
    return checkpoint, engines


def engine_decoder(backend: Backend, ids: np.ndarray) -> Contender:
    batch, prompt_tokens = ids.shape
    no_image = np.zeros((0, backend.config.llm.hidden_size), np.float32)
    no_range = np.zeros((prompt_tokens, 2), np.int32)

    def decode(steps: int) -> float:
        last = np.array([backend.prefill(slot, 0, ids[slot], no_image, no_range).argmax() for slot in range(batch)])
        positions = np.full(batch, prompt_tokens, np.int64)
        started = time.perf_counter()
        for _ in range(steps):
            last = backend.decode(last, positions, no_range[:batch]).argmax(-1)
            positions += 1
        return time.perf_counter() - started

    return decode


def transformers_model(checkpoint: Path, llm: LlmConfig) -> Qwen2ForCausalLM:
    """transformers' own Qwen2 in fp32 with the checkpoint's language model weights."""
    config = Qwen2Config(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        intermediate_size=llm.intermediate_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        rms_norm_eps=llm.norm_eps,
        rope_theta=llm.rope_theta,
        tie_word_embeddings=llm.tie_word_embeddings,
    )
    model = Qwen2ForCausalLM(config).eval()
    with Checkpoint.open(checkpoint) as source:
        prefix = "language_model."
        names = [name for name in source.names if name.startswith(prefix)]
        state = {name.removeprefix(prefix): torch.from_numpy(source.take(name).load()) for name in names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def transformers_decoder(model: Qwen2ForCausalLM, ids: np.ndarray, attention: str, cache_kind: str) -> Contender:
    prompt = torch.from_numpy(ids)

    @torch.inference_mode()
    def decode(steps: int) -> float:
        model.set_attn_implementation(attention)
        cache = (
            StaticCache(config=model.config, max_cache_len=prompt.shape[1] + steps + 1)
            if cache_kind == "static"
            else DynamicCache(config=model.config)
        )
        last = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
        position = prompt.shape[1]
        started = time.perf_counter()
        for _ in range(steps):
            step = torch.tensor([position])
            logits = model(last[:, None], past_key_values=cache, cache_position=step).logits
            last = logits[:, -1].argmax(-1)
            position += 1
        return time.perf_counter() - started

    return decode


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
