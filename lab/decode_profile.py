"""Shows where a decoding step's time goes: the decoder's operators by ONNX Runtime's profiler, OpenVINO's beside them.

    lab/peers/install.sh WORK/peers
    python -m lab.decode_profile --work WORK

Uses the models, prompts and peers of lab.decode_peers. The floor of a step is the time in which this machine reads the
step's weights, at the rate measured here by summing a large array. Every round profiles each engine in turn; times are
medians of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch

from lab.common import run
from lab.decoders import engine_decoder
from lab.decoding import decoding_parser, image_placeholder, prepare, prompts
from lab.peers.client import Peer, open_peers
from lab.rounds import Rounds
from nvlm_trt.backends.base import StepBackend
from nvlm_trt.backends.onnxruntime import session
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine

RESULT = "decode_profile.json"
OPENVINO = "OpenVINO int8"
READ = "this machine"
READ_BYTES = 2 << 30
STEP = "step"  # the whole step: our engine's without the profiler, OpenVINO's with it
# Role of a product -> parts of its weights' names, in our engines and in transformers' Qwen2 (OpenVINO keeps these).
ROLES = {
    "qkv": ("qkv_proj", "q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "lm_head": ("embed_tokens", "lm_head"),
}
ATTENTION = "attention"
REST = "the rest"

Profile = dict[str, float]  # kind of operator -> milliseconds per step


def options() -> argparse.ArgumentParser:
    return decoding_parser(__doc__, 5, ["int8-weight-only", "int8"])


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    checkpoint, engines = prepare(arguments)
    placeholder = image_placeholder(next(iter(engines.values())))
    contenders: dict[str, Callable[[], Mapping[str, float]]] = {READ: read_rate}
    with contextlib.ExitStack() as opened:
        peers, notes = open_peers(arguments, checkpoint, opened, only=(OPENVINO,), options=("--profile",))
        for batch in arguments.batches:
            prompt = prompts(batch, arguments.prompt_tokens)
            for precision, engine in engines.items():
                profile = partial(profile_of_engine, engine, prompt, arguments.steps, arguments.threads)
                contenders[f"nvlm-trt {precision}, batch {batch}"] = profile
            for name, peer in peers.items():
                profile = partial(profile_of_peer, peer, prompt, arguments.steps, placeholder)
                contenders[f"{name}, batch {batch}"] = profile
        rounds.add_versions({name: peer.version for name, peer in peers.items()})
        rounds.run(contenders, arguments.rounds)
    sizes = {precision: megabytes_of(engine) for precision, engine in engines.items()}
    versions = {name: peer.version for name, peer in peers.items()}
    rounds.report(skipped=notes, notes=notes, megabytes_read=sizes, peers=versions)
    rate = rounds.spread(READ, "GB/s").median
    for precision, of_each in sizes.items():
        total = sum(of_each.values())
        print(f"floor of {precision}: {total:.0f} MB of weights at {rate:.1f} GB/s: {total / rate:.1f} ms a step")


def megabytes_of(engine: Engine) -> dict[str, float]:
    sizes: dict[str, float] = defaultdict(float)
    for role, size in weights_of(engine).values():
        sizes[role] += size / 1e6
    return dict(sizes)


def read_rate() -> Mapping[str, float]:
    array = torch.ones(READ_BYTES // 4)
    array.sum()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        array.sum()
        times.append(time.perf_counter() - started)
    return {"GB/s": READ_BYTES / statistics.median(times) / 1e9}


def weights_of(engine: Engine) -> dict[str, tuple[str, int]]:
    """Returns for each product of the decoder: node -> (role, bytes of weights and scales)."""
    graph = onnx.load(engine.path / "decoder.onnx", load_external_data=False).graph
    sizes = {
        tensor.name: int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
    }
    producers = {output: node for node in graph.node for output in node.output}

    def stored(node: onnx.NodeProto) -> Iterator[str]:
        """Yields the tensors that a product reads from the engine's files."""
        for name in node.input:
            if name in sizes:
                yield name
            elif name in producers and producers[name].op_type in ("DequantizeLinear", "Cast", "Mul", "Transpose"):
                yield from stored(producers[name])

    products = {}
    for node in graph.node:
        if node.op_type in ("MatMulNBits", "MatMul", "Gemm"):
            names = list(stored(node))
            products[node.name] = (role_of(" ".join(names)), sum(sizes[name] for name in names))
    return products


def role_of(name: str) -> str:
    for role, parts in ROLES.items():
        if any(part in name for part in parts):
            return role
    return REST


def profile_of_engine(engine: Engine, prompt: np.ndarray, steps: int, threads: int) -> Profile:
    def decode(backend: StepBackend) -> float:
        seconds, _ = engine_decoder(backend)(prompt, steps, image_placeholder(engine))
        return seconds * 1e3 / steps

    return profiled(engine, threads, decode, steps, steps)


def profiled(
    engine: Engine, threads: int, work: Callable[[StepBackend], float], runs: int, repetitions: int = 1
) -> Profile:
    """Profiles the last `runs` runs of the decoder, which repeat something `repetitions` times. `work` returns its
    milliseconds, which are measured without the profiler."""

    def measure() -> float:
        with open_backend(engine, stages=("decoder",), threads=threads) as backend:
            return work(backend)

    step = measure()
    with tempfile.TemporaryDirectory() as folder:

        class Profiled(onnxruntime.SessionOptions):
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling = True
                self.profile_file_prefix = f"{folder}/profile"

        with mock.patch.object(session, "SessionOptions", Profiled):
            measure()
        (path,) = Path(folder).glob("profile*.json")
        events = json.loads(path.read_text(encoding="utf-8"))
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[-runs:]
    first, last = spans[0][0], spans[-1][1]
    weights = weights_of(engine)
    return by_kind(
        step,
        (
            (weights[name][0] if name in weights else None, operator, microseconds / 1e3 / repetitions)
            for name, operator, microseconds in kernels(events, first, last)
        ),
    )


def kernels(events: list[dict[str, Any]], first: int, last: int) -> Iterator[tuple[str, str, int]]:
    """Yields (node, operator, microseconds) of the kernels that began in first .. last."""
    suffix = "_kernel_time"
    for event in events:
        if event["name"].endswith(suffix) and first <= event["ts"] <= last:
            yield event["name"].removesuffix(suffix), event["args"]["op_name"], event["dur"]


def profile_of_peer(peer: Peer, prompt: np.ndarray, steps: int, placeholder: int) -> Profile:
    answer = peer.ask({"prompt": prompt.tolist(), "steps": steps, "banned": placeholder})
    return by_kind(
        answer["seconds"] * 1e3 / steps,
        (
            (role_of(name) if "FullyConnected" in operator else None, operator, milliseconds)
            for name, operator, milliseconds in answer["operators"]
        ),
    )


def by_kind(step: float, operators: Iterable[tuple[str | None, str, float]]) -> Profile:
    """Sums (a product's role or None; operator; milliseconds per step) by role and kind, and adds the step's time."""
    found = dict.fromkeys((*ROLES, ATTENTION, REST), 0.0)
    for role, operator, milliseconds in operators:
        found[role or (ATTENTION if "Attention" in operator else REST)] += milliseconds
    return {STEP: step, **found}


if __name__ == "__main__":
    run(options(), measure, RESULT)
