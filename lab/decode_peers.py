"""Decoding speed of NVLM-D's language model: our precisions, transformers, llama.cpp and OpenVINO, interleaved.

    lab/peers/install.sh /tmp/nvlm-bench/peers
    python lab/decode_peers.py --work /tmp/nvlm-bench

All have the same random weights and continue the same prompts greedily, text only. transformers runs its own Qwen2 in
fp32 and bf16 with each of its attention modes and caches. llama.cpp (Q8_0) and OpenVINO (8-bit weights, the language
model as optimum-intel converts it) run in an environment of their own, as their packages want other versions than ours;
without it they are skipped. Their KV caches are llama.cpp's and OpenVINO's defaults, ours is fp32. Of the first two
tokens of every sequence the result says how many are those of transformers in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Contender, Rounds, built_engine, parser, random_checkpoint, run_main, settings_of
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers_model import language_model

from nvlm_trt.backends.base import Backend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine

PEERS = {"llama.cpp Q8_0": "llama_cpp_worker.py", "OpenVINO int8": "openvino_worker.py"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPARED = 2  # tokens of every sequence

# prompts [batch, tokens], steps, the image token (never sampled) -> seconds of the steps, tokens [batch, 1 + steps]
Decode = Callable[[np.ndarray, int, int], tuple[float, np.ndarray]]


def main() -> None:
    options = decoding_parser(__doc__, "decode_peers.json", 7, ["fp32", "int8", "int8-weight-only", "int4-weight-only"])
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of transformers")
    arguments = options.parse_args()
    rounds, checkpoint, engines = prepare(arguments)
    with contextlib.ExitStack() as opened:
        decoders: dict[str, Decode] = {}
        for precision, engine in engines.items():
            backend = opened.enter_context(open_backend(engine, components=("decoder",), threads=arguments.threads))
            decoders[f"nvlm-trt {precision}"] = engine_decoder(backend)
        models = {dtype: language_model(checkpoint, DTYPES[dtype]) for dtype in arguments.dtypes}
        for dtype, attention, cache in itertools.product(models, ("eager", "sdpa"), ("dynamic", "static")):
            name = f"transformers {dtype} {attention}/{cache}"
            decoders[name] = transformers_decoder(models[dtype], attention, cache)
        peers, notes = open_peers(arguments, checkpoint, opened)
        decoders |= {name: peer.decode for name, peer in peers.items()}
        image_token = next(iter(engines.values())).config.image_token_id
        tokens: dict[str, np.ndarray] = {}
        contenders = {
            name: contender(decoder, arguments, image_token, lambda answer, name=name: tokens.update({name: answer}))
            for name, decoder in decoders.items()
        }
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
    rounds.report(ratios, **others)


def decoding_parser(doc: str | None, json_name: str, rounds: int, precisions: Sequence[str]) -> argparse.ArgumentParser:
    """The options of a benchmark of decoding."""
    options = parser(doc, json_name, rounds)
    options.add_argument("--preset", default="nvlm-d-small")
    options.add_argument("--precisions", nargs="+", default=precisions)
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--steps", type=int, default=16)
    options.add_argument("--peers", type=Path, help="python of the peers' environment [WORK/peers/bin/python]")
    return options


def prepare(arguments: Any) -> tuple[Rounds, Path, dict[str, Engine]]:
    """Rounds to fill, the checkpoint, and its engines by precision."""
    torch.set_num_threads(arguments.threads)
    rounds = Rounds(arguments.json, {**settings_of(arguments), "peers": None})
    checkpoint = random_checkpoint(arguments.work, arguments.preset)
    engines = {name: built_engine(arguments.work, arguments.preset, name) for name in arguments.precisions}
    return rounds, checkpoint, engines


def prompts(batch: int, tokens: int) -> np.ndarray:
    """[batch, tokens] int64, the same in every run: bytes, which every vocabulary has."""
    return np.random.default_rng(0).integers(0, 256, (batch, tokens), dtype=np.int64)


def metric_of(batch: int) -> str:
    return f"batch {batch} tokens/s"


def contender(decode: Decode, arguments: Any, image_token: int, on_tokens: Callable[[np.ndarray], None]) -> Contender:
    """Every batch size once. `on_tokens` gets the first tokens [sequences, COMPARED] of the largest."""

    def measure() -> Mapping[str, float]:
        measured = {}
        for batch in sorted(arguments.batches):
            seconds, tokens = decode(prompts(batch, arguments.prompt_tokens), arguments.steps, image_token)
            assert tokens.shape == (batch, arguments.steps + 1), tokens.shape
            measured[metric_of(batch)] = batch * arguments.steps / seconds
        on_tokens(tokens[:, :COMPARED])
        return measured

    return measure


def engine_decoder(backend: Backend) -> Decode:
    no_image = np.zeros((0, backend.config.llm.hidden_size), np.float32)

    def decode(prompt: np.ndarray, steps: int, banned: int) -> tuple[float, np.ndarray]:
        batch, length = prompt.shape
        no_range = np.zeros((length, 2), np.int32)

        def best(logits: np.ndarray) -> np.ndarray:
            logits[..., banned] = -np.inf
            return logits.argmax(-1)

        answers = [np.array([best(backend.prefill(i, 0, prompt[i], no_image, no_range)) for i in range(batch)])]
        positions = np.full(batch, length, np.int64)
        started = time.perf_counter()
        for _ in range(steps):
            answers.append(best(backend.decode(answers[-1], positions, no_range[:batch])))
            positions += 1
        return time.perf_counter() - started, np.stack(answers, axis=1)

    return decode


def transformers_decoder(model: PreTrainedModel, attention: str, cache_kind: str) -> Decode:
    @torch.inference_mode()
    def decode(prompt: np.ndarray, steps: int, banned: int) -> tuple[float, np.ndarray]:
        model.set_attn_implementation(attention)
        length = prompt.shape[1]
        cache = (
            StaticCache(config=model.config, max_cache_len=length + steps)
            if cache_kind == "static"
            else DynamicCache(config=model.config)
        )

        def step(ids: torch.Tensor) -> torch.Tensor:
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            logits[:, banned] = -torch.inf
            return logits.argmax(-1)

        answers = [step(torch.from_numpy(prompt))]
        started = time.perf_counter()
        for _ in range(steps):
            answers.append(step(answers[-1][:, None]))
        seconds = time.perf_counter() - started
        return seconds, torch.stack(answers, dim=1).numpy()

    return decode


class Peer:
    """A worker in the peers' environment. A context manager; raises PeerError when it does not start."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.version: str = self._read()["ready"]
        except PeerError:
            self.__exit__()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def decode(self, prompt: np.ndarray, steps: int, banned: int) -> tuple[float, np.ndarray]:
        answer = self.ask(prompt, steps, banned)
        return answer["seconds"], np.array(answer["tokens"])

    def ask(self, prompt: np.ndarray, steps: int, banned: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        asked = {"prompt": prompt.tolist(), "steps": steps, "banned": banned}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{Path(self._process.args[1]).stem} ended; what it said is above")
        return json.loads(line)


class PeerError(Exception):
    pass


def open_peers(
    arguments: Any,
    checkpoint: Path,
    opened: contextlib.ExitStack,
    only: Sequence[str] = tuple(PEERS),
    options: Sequence[str] = (),
) -> tuple[dict[str, Peer], list[str]]:
    """Those that start, and a line on each that does not. `options`: of the workers."""
    python = arguments.peers or arguments.work / "peers" / "bin" / "python"
    exported = arguments.work / "hf" / arguments.preset
    converted = {name: arguments.work / "hf" / f"{arguments.preset} {name}" for name in PEERS}
    peers: dict[str, Peer] = {}
    notes = []
    for name in only:
        if not python.exists():
            notes.append(f"{name} skipped: {python} does not exist (--help says how to make it)")
        else:
            if not exported.exists():
                language_model(checkpoint).save_pretrained(exported, max_shard_size="100GB")
            worker = Path(__file__).parent / "peers" / PEERS[name]
            command = [python, worker, exported, converted[name], arguments.threads, *options]
            try:
                peers[name] = opened.enter_context(Peer(list(map(str, command))))
            except PeerError as error:
                notes.append(f"{name} skipped: {error}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return peers, notes


if __name__ == "__main__":
    run_main(main)
