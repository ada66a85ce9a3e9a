"""Compares NVLM-X and -H with NVLM-D: the language model's part of an image of 6+1 tiles and 1,024 tokens of text.

    python -m lab.architectures --work WORK

The three have the same vision encoder and language model. Prefill is all work from image tokens to first logits: the
prompt in the runtime's chunks and, for X and H, the cross-attention keys and values, whose time is also given apart.
Image tokens are noise, which takes as long as a real image. Decoding follows that prompt, one request. KV bytes are
those of that request's tokens, cross-attended ones included.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Mapping

import numpy as np

from lab.common import parser, run
from lab.engines import random_engine
from lab.rounds import Contender, Rounds
from nvlm_trt.api import Message
from nvlm_trt.backends.base import ImageFeatures, StepBackend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.backends.table import DEFAULT_BACKEND, find_backend
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.engine import Engine
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer

RESULT = "architectures.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "numpy")
ARCHITECTURES = ("d", "x", "h")
PREFILL, DECODE = "prefill ms", "decode tokens/s"
CACHE_ITEM_BYTES = 4  # ONNX Runtime's caches are float32


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=7)
    made.add_argument("--size", default="small", help="size of the presets nvlm-{d,x,h}-SIZE")
    made.add_argument("--precisions", nargs="+", default=["fp32"])
    made.add_argument("--text-tokens", type=int, default=1024)
    made.add_argument("--tiles", type=int, default=7, help="thumbnail included")
    made.add_argument("--steps", type=int, default=16)
    made.add_argument(
        "--chunk", type=int, default=find_backend(DEFAULT_BACKEND).prefill_chunk, help="tokens prefilled at once"
    )
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    ratios: list[tuple[str, str, str]] = []
    requests: dict[str, dict[str, int]] = {}
    with contextlib.ExitStack() as opened:
        contenders: dict[str, Contender] = {}
        for precision in arguments.precisions:
            for architecture in ARCHITECTURES:
                engine = random_engine(arguments.work, f"nvlm-{architecture}-{arguments.size}", precision)
                stages = ("decoder", "cross_kv")
                backend = opened.enter_context(open_backend(engine, stages, threads=arguments.threads))
                prompt = encode_prompt(engine, arguments.text_tokens, arguments.tiles)
                name = f"{engine.config.name} {precision}"
                contenders[name] = contender(backend, prompt, arguments.tiles, arguments.chunk, arguments.steps)
                requests[name] = request_size(engine.config, prompt)
                if architecture != "d":
                    baseline = f"nvlm-d-{arguments.size} {precision}"
                    ratios += [(PREFILL, baseline, name), (DECODE, name, baseline)]
        rounds.run(contenders, arguments.rounds)
    rounds.report(ratios, requests=requests)
    for name, request in requests.items():
        print(
            f"{name}: {request['sequence_tokens']} tokens in the sequence, {request['cross_tokens']} cross-attended, "
            f"KV cache {request['kv_bytes'] / 1e6:.1f} MB"
        )


def encode_prompt(engine: Engine, text_tokens: int, tiles: int) -> EncodedPrompt:
    tokenizer = Tokenizer.from_directory(engine.path)
    question = PromptWriter(tokenizer).write(text_tokens, np.random.default_rng(0))
    return PromptEncoder(engine.config, tokenizer).encode([Message("user", question)], [tiles])


def request_size(config: NvlmConfig, prompt: EncodedPrompt) -> dict[str, int]:
    tokens, cross = len(prompt.input_ids), prompt.cross_tokens
    per_layer = 2 * config.llm.num_kv_heads * config.llm.head_dim * CACHE_ITEM_BYTES  # key and value of one token
    kv_bytes = per_layer * (tokens * config.llm.num_layers + cross * len(config.cross_layers))
    return {"sequence_tokens": tokens, "cross_tokens": cross, "kv_bytes": kv_bytes}


def contender(backend: StepBackend, prompt: EncodedPrompt, tiles: int, chunk: int, steps: int) -> Contender:
    config = backend.config
    shape = (tiles, config.tokens_per_tile, config.llm.hidden_size)
    image_tokens = backend.import_tokens(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    ranges = np.array([prompt.decode_range], np.int32)

    def measure() -> Mapping[str, float]:
        started = time.perf_counter()
        image = backend.features(image_tokens)
        backend.write_cross_kv(0, 0, image)
        cross_kv = time.perf_counter() - started
        logits = prefill(backend, prompt, image, chunk)
        prefilled = time.perf_counter() - started
        position = np.array([len(prompt.input_ids)])
        started = time.perf_counter()
        for _ in range(steps):
            logits[config.image_token_id] = -np.inf
            logits = backend.decode(np.array([logits.argmax()]), position, ranges)[0]
            position += 1
        decoded = time.perf_counter() - started
        return {PREFILL: 1e3 * prefilled, "of it cross-attention K/V ms": 1e3 * cross_kv, DECODE: steps / decoded}

    return measure


def prefill(backend: StepBackend, prompt: EncodedPrompt, image: ImageFeatures, chunk: int) -> np.ndarray:
    """Prefills slot 0 as the scheduler does, `chunk` tokens at a time -> logits [vocab]."""
    logits = np.empty(0, np.float32)
    used = 0
    for start in range(0, len(prompt.input_ids), chunk):
        ids = prompt.input_ids[start : start + chunk]
        placeholders = int(np.count_nonzero(ids == backend.config.image_token_id))
        embeddings = backend.embeddings([image], used, used + placeholders)
        ranges = prompt.cross_ranges[start : start + chunk]
        is_last = start + chunk >= len(prompt.input_ids)
        logits = backend.prefill(0, start, ids, embeddings, ranges, is_last)
        used += placeholders
    assert used == prompt.placeholders, (used, prompt.placeholders)
    return logits


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
