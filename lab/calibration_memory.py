"""Measures peak memory and time of a calibration, by layer and with the whole model, of models of more and more layers.

    python -m lab.calibration_memory --work WORK

A layer of the models has the shape of nvlm-d-small's LLM (60 MB in float32); vision encoder and vocabulary are those of
nvlm-d-tiny. The weights are random. A process of its own calibrates each model, on samples of the document tasks.
Memory is the high-water mark of the process's resident memory (VmHWM) above that of a bare interpreter, as the kernel
keeps it: with the pages of mapped files, which the kernel can take back.
"""

from __future__ import annotations

import argparse
import re
import shutil
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
from nvlm_trt.checkpoint.random_checkpoint import write_random_checkpoint
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS

RESULT = "calibration_memory.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "numpy")
WAYS = ("layer", "model")

HIGH_WATER = """
import re
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
CALIBRATE = """
import sys
from pathlib import Path
from nvlm_trt.backends.onnxruntime.build import calibrate
from nvlm_trt.builders.build_steps import BuildJob
from nvlm_trt.builders.quantization.build_samples import document_samples
from nvlm_trt.builders.source import EngineSource
from nvlm_trt.progress import no_progress
# the first to go if memory runs out
open("/proc/self/oom_score_adj", "w").write("1000")
checkpoint, work, way, count, saved = sys.argv[1:]
source, output = EngineSource(checkpoint, {}), Path(work) / "engine"
job = BuildJob(source, {}, output, output, no_progress, calibrate_by=way)
calibrate(job, document_samples("train", int(count), no_progress)).save(Path(saved))
"""


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--layers", nargs="+", type=int, default=(2, 8, 24), help="of the LLM, one model for each")
    made.add_argument("--samples", type=int, default=13)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        contenders = {
            f"{layers} layers, by {way}": contender(Path(folder), layers, way, arguments.samples)
            for layers in arguments.layers
            for way in WAYS
        }
        rounds.run(contenders, arguments.rounds, warm_up=False)
    metric = "peak above the interpreter MB"
    most, least = max(arguments.layers), min(arguments.layers)
    rounds.report([(metric, f"{most} layers, by {way}", f"{least} layers, by {way}") for way in WAYS])


def model(layers: int) -> NvlmConfig:
    tiny, small = PRESETS["nvlm-d-tiny"], PRESETS["nvlm-d-small"]
    llm = replace(small.llm, num_layers=layers, vocab_size=tiny.llm.vocab_size, tie_word_embeddings=False)
    return replace(tiny, llm=replace(llm, max_position_embeddings=tiny.llm.max_position_embeddings))


def contender(folder: Path, layers: int, way: str, samples: int) -> Contender:
    def measure() -> Mapping[str, float]:
        checkpoint, saved = folder / f"{layers} layers", folder / f"{layers} layers.{way}.json"
        if not checkpoint.exists():
            write_random_checkpoint(checkpoint, model(layers), seed=0)
        bare = high_water_mb([])
        with tempfile.TemporaryDirectory(dir=folder) as work:
            started = time.perf_counter()
            peak = high_water_mb([checkpoint, work, way, samples, saved])
            seconds = time.perf_counter() - started
        compare(folder, layers)
        return {"peak above the interpreter MB": peak - bare, "calibration s": seconds}

    return measure


def compare(folder: Path, layers: int) -> None:
    """Raises EngineError if both ways have calibrated a model and their files differ. Removes the files of a model that
    both have calibrated."""
    files = [folder / f"{layers} layers.{way}.json" for way in WAYS]
    if all(file.exists() for file in files):
        if files[0].read_bytes() != files[1].read_bytes():
            raise EngineError(f"the calibrations of {layers} layers differ; compare {files[0]} and {files[1]}")
        shutil.rmtree(folder / f"{layers} layers")
        for file in files:
            file.unlink()


def high_water_mb(calibrate: list[object]) -> float:
    """Returns the high-water mark of a Python process that calibrates, or of a bare one if `calibrate` is empty."""
    command = [sys.executable, "-c", (CALIBRATE if calibrate else "") + HIGH_WATER, *map(str, calibrate)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if process.returncode or not re.fullmatch(r"\d+\n", process.stdout):
        raise EngineError(f"the calibration ended with status {process.returncode}; its last messages are above")
    return int(process.stdout) * 1024 / 1e6


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
