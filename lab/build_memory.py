"""Measures the peak memory of building an engine of 72B-shaped layers, above that of a bare interpreter.

    python -m lab.build_memory --work WORK

The checkpoint has NVLM-D-72B's shapes with as many layers as make `--gigabytes` of bfloat16, or as few as the disk has
room for. The checkpoint's file is sparse: the disk stores nothing but the header, every weight reads as zero, and the
build treats zeros like any number. A process of its own builds each precision once, without the smoke test and with a
made-up calibration: a smoke test and a real calibration load a whole engine and would measure ONNX Runtime. The engine
is removed afterwards. Memory is the high-water mark of the process's resident memory (VmHWM), as the kernel keeps it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lab.code_state import ROOT
from lab.common import parser, run
from lab.rounds import Contender, Rounds
from nvlm_trt.builders.quantization.calibration import Calibration, LinearInput
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.checkpoint.weight_files import INDEX_FILE, WEIGHTS_FILE
from nvlm_trt.engine import CALIBRATION
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.hf_config import config_to_hf
from nvlm_trt.model.layout import checkpoint_layout
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.prompt.tokenizer import Tokenizer, write_byte_tokenizer

RESULT = "build_memory.json"
PACKAGES = ("nvlm-trt", "onnx", "onnx-ir", "numpy")
PRECISIONS = ("fp32", "int8-weight-only", "int4-weight-only", "int8")
VISION_LAYERS = 3  # the rest are the language model's, which has the large matrices
BYTES = {"checkpoint": 2, "engine": 4}  # per weight, at most
SPARE_DISK = 2 << 30
MEMORY = "peak above the interpreter MB"

HIGH_WATER = """
import re
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
BUILD = """
import sys
from pathlib import Path
# the first to go if memory runs out
open("/proc/self/oom_score_adj", "w").write("1000")
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
checkpoint, output, precision, calibration = sys.argv[1:]
options = QuantizationOptions(Path(calibration), gate=None)
build_engine(checkpoint, output, precision=precision, smoke_test=False, quantization=options)
"""


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--preset", default="nvlm-d-72b", help="preset whose shapes the layers have")
    made.add_argument("--gigabytes", type=float, default=14, help="size of the checkpoint")
    made.add_argument("--vocab-size", type=int, help="for smaller embeddings than the preset's")
    made.add_argument("--precisions", nargs="+", default=PRECISIONS)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    config = PRESETS[arguments.preset]
    if arguments.vocab_size:
        config = replace(config, llm=replace(config.llm, vocab_size=arguments.vocab_size))
    config = fitting(config, arguments.gigabytes * 1e9, shutil.disk_usage(arguments.work).free)
    weights = sorted(checkpoint_layout(config).items(), key=lambda item: math.prod(item[1]))
    size, (largest, shape) = checkpoint_bytes(config), weights[-1]
    largest_mb = 4 * math.prod(shape) / 1e6
    print(
        f"{config.llm.num_layers} layers of the LLM, {config.vision.num_layers} of the vision encoder: "
        f"{size / 1e9:.1f} GB of bfloat16; the largest tensor, {largest}, has {largest_mb:.0f} MB in float32",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        checkpoint, calibration = Path(folder) / "checkpoint", Path(folder) / CALIBRATION
        write_sparse_checkpoint(checkpoint, config)
        write_calibration(calibration, checkpoint)
        contenders = {
            name: contender(checkpoint, calibration, Path(folder) / "engine", name) for name in arguments.precisions
        }
        # a warm-up would build everything twice
        rounds.run(contenders, arguments.rounds, warm_up=False)
    rounds.report(
        checkpoint_gb=size / 1e9,
        llm_layers=config.llm.num_layers,
        vision_layers=config.vision.num_layers,
        vocab_size=config.llm.vocab_size,
        largest_tensor={"name": largest, "shape": shape, "float32_mb": largest_mb},
    )


def fitting(config: NvlmConfig, wanted: float, free_disk: int) -> NvlmConfig:
    """Returns `config` with as many LLM layers as come nearest to `wanted` bytes and leave room for the engine.

    Raises EngineError if not even one layer fits into `free_disk` bytes."""

    def with_layers(layers: int) -> NvlmConfig:
        vision = replace(config.vision, num_layers=min(VISION_LAYERS, config.vision.num_layers))
        return replace(config, vision=vision, llm=replace(config.llm, num_layers=layers))

    layers = min(range(1, config.llm.num_layers + 1), key=lambda n: abs(checkpoint_bytes(with_layers(n)) - wanted))
    room = (free_disk - SPARE_DISK) * BYTES["checkpoint"] // BYTES["engine"]
    fits = next((n for n in range(layers, 0, -1) if checkpoint_bytes(with_layers(n)) <= room), None)
    if fits is None:
        raise EngineError(f"an engine of one layer does not fit into {free_disk / 1e9:.0f} GB; free space in --work")
    if fits < layers:
        print(f"note: {layers} layers would not fit into {free_disk / 1e9:.0f} GB of disk; {fits} do", file=sys.stderr)
    return with_layers(fits)


def checkpoint_bytes(config: NvlmConfig) -> int:
    return sum(BYTES["checkpoint"] * math.prod(s) for s in checkpoint_layout(config).values())


def write_sparse_checkpoint(directory: Path, config: NvlmConfig, shards: int = 1) -> None:
    """Writes config, tokenizer, and safetensors files that have their full length but holes for data."""
    directory.mkdir()
    write_byte_tokenizer(directory, config.max_tiles)
    config = replace(config, image_token_id=Tokenizer.from_directory(directory).image_token_id)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config), allow_nan=False), encoding="utf-8")
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    total, done = checkpoint_bytes(config), 0
    for name, shape in checkpoint_layout(config).items():
        parts[min(done * shards // total, shards - 1)][name] = shape
        done += BYTES["checkpoint"] * math.prod(shape)
    names = [WEIGHTS_FILE]
    if shards > 1:
        names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, allow_nan=False), encoding="utf-8")
    for name, part in zip(names, parts, strict=True):
        _write_sparse_file(directory / name, part)


def _write_sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + BYTES["checkpoint"] * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries, allow_nan=False).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


def write_calibration(path: Path, checkpoint_dir: Path) -> None:
    """Writes a calibration in which the inputs of every linear layer reach 1 in each channel."""
    linears = {}
    with Checkpoint.open(checkpoint_dir) as checkpoint:
        for name, shape in checkpoint_layout(checkpoint.config).items():
            if len(shape) > 1 and name.endswith(".weight"):
                # the graphs compute q, k and v as one product
                layer = name.removesuffix(".weight").replace("self_attn.q_proj", "self_attn.qkv_proj")
                linears[layer] = LinearInput(abs_max=1, clip=1, channels=[1] * math.prod(shape[1:]))
        Calibration(checkpoint_digest=checkpoint.digest, samples={}, linears=linears).save(path)


def contender(checkpoint: Path, calibration: Path, output: Path, precision: str) -> Contender:
    def measure() -> Mapping[str, float]:
        bare = high_water_mb([])
        started = time.perf_counter()
        try:
            built = high_water_mb([checkpoint, output, precision, calibration])
            size = sum(path.stat().st_size for path in output.rglob("*"))
        finally:
            shutil.rmtree(output, ignore_errors=True)
        return {MEMORY: built - bare, "build s": time.perf_counter() - started, "engine GB": size / 1e9}

    return measure


def high_water_mb(build: list[Path | str]) -> float:
    """Returns the high-water mark of a Python process that makes the build, or of a bare one if `build` is empty."""
    command = [sys.executable, "-c", (BUILD if build else "") + HIGH_WATER, *map(str, build)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if process.returncode:
        reason = (
            "killed, probably for memory" if process.returncode == -signal.SIGKILL else "its last messages are above"
        )
        raise EngineError(f"the build ended with status {process.returncode} ({reason})")
    return int(process.stdout) * 1024 / 1e6


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
