"""Measures the memory of engines on the CPU against what `nvlm-trt plan` says.

    python -m lab.engine_memory --work WORK --publish

A process of its own opens each engine, encodes the largest image, fills the caches of all slots, runs the longest chunk
of a prompt and a token of each slot. Held is the growth of its anonymous memory since the imports (RssAnon). Pages that
are mapped from the engine's files (RssFile) can be dropped by the system, and only those that were read are there: they
are at most as many as planned.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lab.code_state import ROOT
from lab.common import parser, run
from lab.engines import random_engine
from lab.rounds import Contender, Rounds
from nvlm_trt.engine import Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import plan_engine

RESULT = "engine_memory.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "openvino", "numpy")
TAG_LENGTH = 1  # tokens of a tile tag in the tokenizer of a random checkpoint
HELD, PLANNED, RATIO = "held MB", "planned MB", "planned / held"
MAPPED, MOST_MAPPED = "mapped MB", "planned mapped MB"

PROGRAM = """
import json, re, sys
import numpy as np
import onnxruntime, openvino
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.engine import Engine

def memory():
    status = open("/proc/self/status").read()
    return [1024 * int(re.search(name + r":\\s+(\\d+) kB", status)[1]) for name in ("RssAnon", "RssFile")]

engine = Engine.open(sys.argv[1])
before = memory()
backend = open_backend(engine)
config, limits = engine.config, engine.limits
edge = config.vision.image_size
for _ in range(2):
    backend.features(backend.encode(np.zeros((config.tiles_per_image, 3, edge, edge), np.float32)))
for slot in range(1, limits.max_slots):
    backend.move_slot(0, slot, limits.max_seq_len, limits.max_image_tokens)
if limits.max_slots > 1:
    backend.swap_slots(0, 1, limits.max_seq_len, limits.max_image_tokens)
chunk = min(int(sys.argv[2]), limits.max_seq_len - 1)
ranges = np.tile(np.array([0, limits.max_image_tokens], np.int32), (chunk, 1))
start = limits.max_seq_len - 1 - chunk
backend.prefill(0, start, np.zeros(chunk, np.int64), backend.embeddings([], 0, 0), ranges)
slots = limits.max_slots
backend.decode(np.zeros(slots, np.int64), np.full(slots, limits.max_seq_len - 1), np.tile(ranges[:1], (slots, 1)))
print(json.dumps([after - less for after, less in zip(memory(), before)]))
"""


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--presets", nargs="+", default=["nvlm-d-small"])
    made.add_argument("--precisions", nargs="+", default=["bf16", "int8-weight-only"])
    made.add_argument("--engines", type=Path, nargs="+", default=[], help="instead of random ones")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    engines = [Engine.open(path) for path in arguments.engines] or [
        random_engine(arguments.work, preset, precision)
        for preset in arguments.presets
        for precision in arguments.precisions
    ]
    # nothing but the memory of a process is measured: a warm-up would change nothing
    rounds.run({_name(engine): contender(engine) for engine in engines}, arguments.rounds, warm_up=False)
    rounds.report()


def _name(engine: Engine) -> str:
    precision = dict.fromkeys(engine.manifest.precision.values())
    return f"{engine.manifest.model_name} {'/'.join(precision)}"


def contender(engine: Engine) -> Contender:
    def measured() -> Mapping[str, float]:
        design = EngineDesign.of(engine, TAG_LENGTH)
        command = [sys.executable, "-c", PROGRAM, str(engine.path), str(design.backend.prefill_chunk)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
        if process.returncode:
            raise EngineError(f"{engine.path} ended with status {process.returncode}; its last messages are above")
        held, mapped = json.loads(process.stdout)
        stages = plan_engine(design).stages.values()
        planned = sum(stage.total - stage.mapped for stage in stages)
        return {
            HELD: held / 1e6,
            PLANNED: planned / 1e6,
            RATIO: planned / held,
            MAPPED: mapped / 1e6,
            MOST_MAPPED: sum(stage.mapped for stage in stages) / 1e6,
        }

    return measured


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
