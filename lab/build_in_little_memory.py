"""Builds 72B-shaped layers, smoke test included, where the process and all its files may take little memory.

    python -m lab.build_in_little_memory --work WORK

The build runs as `nvlm-trt build` in a control group of its own (needs root). The kernel counts everything in the
group, the interpreter and the pages of all files that it reads and writes too: it drops pages of files when the limit
is reached, and kills the build if that is not enough. "not of files" is the most that it could not drop. The shards are
sparse: every weight reads as zero, and the build treats zeros like any number.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from lab.build_at_size import SHARDS, with_layers
from lab.build_memory import checkpoint_bytes, write_sparse_checkpoint
from lab.common import parser, run
from lab.control_group import control_group, run_in
from lab.rounds import Contender, Rounds
from nvlm_trt.model.presets import PRESETS

RESULT = "build_in_little_memory.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "openvino", "numpy")
PRECISIONS = ("bf16", "fp32", "int8-weight-only")


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--presets", nargs="+", default=["nvlm-d-72b", "nvlm-h-72b"], help="shapes of the layers")
    made.add_argument("--llm-layers", type=int, default=1)
    made.add_argument("--vision-layers", type=int, default=1)
    made.add_argument("--precisions", nargs="+", default=PRECISIONS)
    made.add_argument("--limit-mb", type=int, default=2000)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    sizes = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        contenders = {}
        for preset in arguments.presets:
            config = with_layers(PRESETS[preset], arguments.llm_layers, arguments.vision_layers)
            write_sparse_checkpoint(Path(name, preset), config, SHARDS)
            sizes[preset] = checkpoint_bytes(config) / 1e9
            for precision in arguments.precisions:
                contenders[f"{preset} {precision}"] = building(Path(name, preset), precision, arguments.limit_mb)
        rounds.run(contenders, arguments.rounds, warm_up=False)
    rounds.report(checkpoint_gb=sizes)


def building(checkpoint: Path, precision: str, limit_mb: int) -> Contender:
    output = checkpoint.with_name("engine")

    def measured() -> Mapping[str, float]:
        build = [sys.executable, "-m", "nvlm_trt.cli", "build", "--no-gate", "--precision", precision]
        command = [*build, "--checkpoint", str(checkpoint), "--output", str(output)]
        started = time.perf_counter()
        try:
            with control_group(limit_mb * 1_000_000) as group:
                most = run_in(group, command)
            seconds = time.perf_counter() - started
            size = sum(path.stat().st_size for path in output.rglob("*"))
        finally:
            shutil.rmtree(output, ignore_errors=True)
        return {"s": seconds, "engine GB": size / 1e9, "not of files MB": most / 1e6}

    return measured


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
