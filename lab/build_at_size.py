"""Measures how fast a build of 72B-shaped layers writes, against what disk and conversion allow, and its memory.

    python -m lab.build_at_size --work WORK

The shards are sparse: the disk stores their headers, every weight reads as zero, and the build treats zeros like any
number. Three things are measured in turn, each by a process of its own:

build PRECISION      a build as `nvlm-trt build` makes it, without the smoke test, which loads the engine: config,
                     tokenizer, all graphs, their weights synced to the disk, hashes, manifest, publication
convert PRECISION    the same, but what would be written is dropped: the engine's files are holes
write PRECISION      as many bytes as the engine has, written in one go and synced

"of the slower" is the time of the slower of the two last over the time of the build: 1 is a build that costs nothing
beside that. Hashing, which reads all files once more, is left out of both; it is given apart. Builds on the disk have
few layers, as the disk is small. `deep PRECISION` has as many layers as the preset, or as asked for, and drops what
would be written: it shows that memory does not grow with the layers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lab.build_memory import HIGH_WATER, MEMORY, PACKAGES, checkpoint_bytes, write_calibration, write_sparse_checkpoint
from lab.code_state import ROOT
from lab.common import parser, run
from lab.rounds import Contender, Rounds
from nvlm_trt.engine import CALIBRATION
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS

RESULT = "build_at_size.json"
PRECISIONS = ("bf16", "int8-weight-only")
SECONDS, HASHING, RATE, SHARE = "s", "of it hashing s", "MB/s", "of the slower"
BLOCK = 16 << 20  # bytes of a plain write
SHARDS = 46  # as published

BUILD = """
import json, sys, time
from pathlib import Path
open("/proc/self/oom_score_adj", "w").write("1000")  # the first to go if memory runs out
from nvlm_trt.builders import data_file, engine_build
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.graphs import streamed
checkpoint, output, precision, calibration, drop = sys.argv[1:]
if drop == "drop":
    for module in (data_file, streamed):
        module.write_at = lambda descriptor, data, offset: None
    engine_build.check_disk = lambda *arguments: None
seen = {}
def progress(stage, done, total):
    now = time.perf_counter()
    seen[stage] = (seen.get(stage, (now,))[0], now)
started = time.perf_counter()
options = QuantizationOptions(Path(calibration), gate=None)
if "int8" not in precision.split(","):
    options = QuantizationOptions(gate=None)
build_engine(checkpoint, output, precision=precision, smoke_test=False, quantization=options, progress=progress)
ended = time.perf_counter()
first, last = seen["hashing"]
print(json.dumps({"seconds": ended - started, "hashing": last - first}))
"""


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--preset", default="nvlm-d-72b", help="preset whose shapes the layers have")
    made.add_argument("--llm-layers", type=int, default=1, help="layers of the LLM in builds on the disk")
    made.add_argument("--vision-layers", type=int, default=3)
    made.add_argument("--vocab-size", type=int, help="for smaller embeddings than the preset's, on the disk")
    made.add_argument("--precisions", nargs="+", default=PRECISIONS)
    made.add_argument("--deep", nargs="*", default=[], help="precisions of deep builds, which drop their data")
    made.add_argument("--deep-llm-layers", type=int, help="of deep builds [those of the preset]")
    made.add_argument("--deep-vision-layers", type=int)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[arguments.preset]
    few = with_layers(preset, arguments.llm_layers, arguments.vision_layers)
    if arguments.vocab_size:
        few = replace(few, llm=replace(few.llm, vocab_size=arguments.vocab_size))
    deep = with_layers(
        preset,
        arguments.deep_llm_layers or preset.llm.num_layers,
        arguments.deep_vision_layers or preset.vision.num_layers,
    )
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        contenders: dict[str, Contender] = {}
        for part, config, precisions in (("few", few, arguments.precisions), ("deep", deep, arguments.deep)):
            checkpoint = folder / part
            write_sparse_checkpoint(checkpoint, config, SHARDS)
            write_calibration(folder / f"{part}-{CALIBRATION}", checkpoint)
            for precision in precisions:
                if part == "deep":
                    contenders[f"deep {precision}"] = building(checkpoint, precision, drop=True)
                    continue
                contenders[f"convert {precision}"] = building(checkpoint, precision, drop=True)
                contenders[f"build {precision}"] = building(checkpoint, precision, drop=False)
                contenders[f"write {precision}"] = writing(folder, rounds, f"build {precision}")
        rounds.run(contenders, arguments.rounds, warm_up=False)
    for precision in arguments.precisions:
        writes = rounds.values[f"write {precision}"][SECONDS]
        converts, builds = (without_hashing(rounds.values[f"{name} {precision}"]) for name in ("convert", "build"))
        shares = [max(pair) / build for *pair, build in zip(converts, writes, builds, strict=True)]
        print(f"{precision}: {SHARE}", [round(share, 2) for share in shares])
    rounds.report(
        checkpoint_gb={"few": checkpoint_bytes(few) / 1e9, "deep": checkpoint_bytes(deep) / 1e9},
        llm_layers={"few": few.llm.num_layers, "deep": deep.llm.num_layers},
        vision_layers={"few": few.vision.num_layers, "deep": deep.vision.num_layers},
        vocab_size={"few": few.llm.vocab_size, "deep": deep.llm.vocab_size},
    )


def without_hashing(values: Mapping[str, Sequence[float]]) -> list[float]:
    return [seconds - hashing for seconds, hashing in zip(values[SECONDS], values[HASHING], strict=True)]


def with_layers(config: NvlmConfig, llm: int, vision: int) -> NvlmConfig:
    return replace(config, vision=replace(config.vision, num_layers=vision), llm=replace(config.llm, num_layers=llm))


def building(checkpoint: Path, precision: str, drop: bool) -> Contender:
    output = checkpoint.parent / "engine"
    calibration = checkpoint.parent / f"{checkpoint.name}-{CALIBRATION}"

    def measure() -> Mapping[str, float]:
        bare = _run(HIGH_WATER)
        arguments = [str(part) for part in (checkpoint, output, precision, calibration, "drop" if drop else "keep")]
        try:
            *_, report, high = _run(BUILD + HIGH_WATER, *arguments)
            size = sum(path.stat().st_size for path in output.rglob("*"))
        finally:
            shutil.rmtree(output, ignore_errors=True)
        measured = json.loads(report)
        seconds = measured["seconds"]
        return {
            SECONDS: seconds,
            "GB": size / 1e9,
            RATE: size / 1e6 / seconds,
            MEMORY: (int(high) - int(bare[-1])) * 1024 / 1e6,
            HASHING: measured["hashing"],
        }

    return measure


def writing(folder: Path, rounds: Rounds, build: str) -> Contender:
    """Writes as many bytes as the last build has, the same at every place, and waits for the disk."""

    def measure() -> Mapping[str, float]:
        size = int(rounds.values[build]["GB"][-1] * 1e9)
        block = os.urandom(BLOCK)
        path = folder / "plain"
        started = time.perf_counter()
        try:
            with path.open("wb", buffering=0) as file:
                for _ in range(math.ceil(size / BLOCK)):
                    file.write(block)
                os.fdatasync(file.fileno())
            seconds = time.perf_counter() - started
        finally:
            path.unlink(missing_ok=True)
        return {SECONDS: seconds, "GB": size / 1e9, RATE: size / 1e6 / seconds}

    return measure


def _run(program: str, *arguments: str) -> list[str]:
    """Runs a program and returns the lines that it prints."""
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False
    )
    if process.returncode:
        raise EngineError(f"the build ended with status {process.returncode}; its last messages are above")
    return process.stdout.split("\n")[:-1]


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
