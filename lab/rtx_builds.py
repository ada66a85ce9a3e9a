"""Measures builds with TensorRT-RTX on a machine without a GPU: time, peak memory against what `plan` says, plans.

    python -m lab.rtx_builds --work WORK

Builds random checkpoints of the presets `small` in every precision, and slices of the presets `72b`: two layers of the
LLM, two of the vision encoder, gated cross-attention in front of the first LLM layer, a smaller vocabulary. A process
of its own builds each engine once, without the gate and a real calibration, which measure ONNX Runtime, and without the
smoke test, except in the rows `tried`. Memory is the highest sum of the resident memory of that process and its
children, sampled ten times a second: the pages of mapped weights count. The engine is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from lab.build_memory import write_calibration
from lab.code_state import ROOT
from lab.common import parser, run
from lab.rounds import Contender, Rounds
from nvlm_trt.backends.tensorrt_rtx import SPEC
from nvlm_trt.backends.tensorrt_rtx.memory import builder_memory
from nvlm_trt.backends.tensorrt_rtx.record import record_of
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import CALIBRATION, Engine
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS
from nvlm_trt.planner.design import EngineDesign
from nvlm_trt.planner.memory import plan_engine, stage_weights

RESULT = "rtx_builds.json"
PACKAGES = ("nvlm-trt", "onnx", "onnx-ir", "numpy", "tensorrt-rtx-cu13-libs")
SMALL = ("nvlm-d-small", "nvlm-x-small", "nvlm-h-small")
SLICES = ("nvlm-d-72b", "nvlm-x-72b", "nvlm-h-72b")
SLICE_LAYERS = 2
SLICE_VOCABULARY = 16384
SLICE_PRECISIONS = ("bf16", "fp8", "int4-weight-only")
TRIED = ("bf16", "int4-weight-only")  # precisions in which the engines of SMALL are tried, too
SAMPLING_SECONDS = 0.1
TAG_LENGTH = 1  # tokens of a tile tag in the tokenizer of a random checkpoint
PEAK, PLANNED = "peak GB", "planned GB"

BUILD = """
import sys
from pathlib import Path
# the first to go if memory runs out
open("/proc/self/oom_score_adj", "w").write("1000")
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
checkpoint, output, precision, calibration, tried = sys.argv[1:]
options = QuantizationOptions(Path(calibration), gate=None)
build_engine(
    checkpoint, output, precision=precision, smoke_test=bool(tried), quantization=options, backend="tensorrt-rtx"
)
"""


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--presets", nargs="*", default=[*SMALL, *SLICES])
    made.add_argument("--precisions", nargs="+", help="in place of all, and of those of the slices")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    contenders = {}
    for preset in arguments.presets:
        for precision in arguments.precisions or precisions_of(preset):
            for tried in (False, True) if preset in SMALL and precision in TRIED else (False,):
                name = f"{preset} {precision}{', tried' if tried else ''}"
                contenders[name] = contender(arguments.work, preset, precision, tried)
    # a warm-up would build everything twice
    rounds.run(contenders, arguments.rounds, warm_up=False)
    rounds.report(slice_layers=SLICE_LAYERS, slice_vocabulary=SLICE_VOCABULARY)


def precisions_of(preset: str) -> tuple[str, ...]:
    return SLICE_PRECISIONS if preset in SLICES else tuple(SPEC.precisions.names)


def config_of(preset: str) -> NvlmConfig:
    """Returns the config of a preset, or of the slice of a large one."""
    config = PRESETS[preset]
    if preset not in SLICES:
        return config
    llm = replace(config.llm, num_layers=SLICE_LAYERS, vocab_size=SLICE_VOCABULARY)
    return replace(config, vision=replace(config.vision, num_layers=SLICE_LAYERS), llm=llm)


def contender(work: Path, preset: str, precision: str, tried: bool) -> Contender:
    def measured() -> Mapping[str, float]:
        checkpoint = work / "checkpoints" / f"rtx-{preset}"
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, config_of(preset), seed=0)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            calibration, output = Path(folder) / CALIBRATION, Path(folder) / "engine"
            write_calibration(calibration, checkpoint)
            started = time.perf_counter()
            peak = peak_of_build([checkpoint, output, precision, calibration, "tried" if tried else ""])
            seconds = time.perf_counter() - started
            engine = Engine.open(output)
            with Checkpoint.open(checkpoint) as opened:
                design = replace(EngineDesign.of(engine, TAG_LENGTH), config=opened.config)
            if tried:
                planned = plan_engine(design).host_building
            else:
                stages = stage_weights(design)
                planned = builder_memory(list(stages.values()))
            plans = sum(path.stat().st_size for path in output.glob("*.plan"))
            fused = all(record_of(engine).fused.values())
            shutil.rmtree(output)
        return {
            "build s": seconds,
            PEAK: peak / 1e9,
            PLANNED: planned / 1e9,
            "planned / peak": planned / peak,
            "plans GB": plans / 1e9,
            "fused": float(fused),
        }

    return measured


def peak_of_build(build: list[Path | str]) -> int:
    """Builds in a process of its own. Returns the highest resident memory, in bytes, of it and its children."""
    process = subprocess.Popen([sys.executable, "-c", BUILD, *map(str, build)], cwd=ROOT)
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        peak = max(peak, resident(watched))
        time.sleep(SAMPLING_SECONDS)
    if process.returncode:
        raise EngineError(
            f"the build of {json.dumps(list(map(str, build)), allow_nan=False)} ended with status {process.returncode}"
        )
    return peak


def resident(process: psutil.Process) -> int:
    """Sums the resident memory of a process and its children; 0 for a process that has ended."""
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        return total
    return total


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
