"""Measures the peak memory of `nvlm-trt verify` on engines of 72B-shaped layers, one layer and several.

    python -m lab.verify_memory --work WORK

Checkpoint and engine have NVLM-D-72B's widths and vocabulary, and few layers. Both are sparse: their weights are zeros,
which the disk does not store and the comparison computes with like any number; the image is cut into 6 + 1 tiles. A
process of its own makes each comparison with `--memory 0`, so that the engine runs a layer at a time. Its peak is given
twice: all resident memory (VmHWM), and what of it is in no file (RssAnon, sampled). The difference is the mapped
weights of the engine, which the kernel can drop at any time.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lab.build_memory import HIGH_WATER, write_sparse_checkpoint
from lab.code_state import ROOT
from lab.common import parser, run
from lab.rounds import Contender, Rounds
from nvlm_trt.builders.engine_build import build_engine
from nvlm_trt.errors import EngineError
from nvlm_trt.model.config import NvlmConfig
from nvlm_trt.model.presets import PRESETS

RESULT = "verify_memory.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "openvino", "torch", "numpy")
VERIFY = """
import sys, threading, time
from pathlib import Path
# the first to go if memory runs out
open("/proc/self/oom_score_adj", "w").write("1000")
anonymous = 0
def sample():
    global anonymous
    while True:
        lines = open("/proc/self/status").read().splitlines()
        anonymous = max(anonymous, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
        time.sleep(0.02)
threading.Thread(target=sample, daemon=True).start()
from nvlm_trt.evaluation.parity import verify_engine
engine, checkpoint, tokens = sys.argv[1:]
report = verify_engine(Path(engine), Path(checkpoint), tokens=int(tokens), memory=0)
assert report.passed, report.stages
print(anonymous)
"""


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--preset", default="nvlm-d-72b", help="preset whose shapes the layers have")
    made.add_argument("--layers", type=int, nargs="+", default=(1, 3), help="of the LLM and of the vision encoder")
    made.add_argument("--precision", default="bf16")
    made.add_argument("--tokens", type=int, default=4)
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    contenders = {f"{layers} layers": contender(arguments, layers) for layers in arguments.layers}
    rounds.run(contenders, arguments.rounds, warm_up=False)
    rounds.report()


def contender(arguments: argparse.Namespace, layers: int) -> Contender:
    def measured() -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            checkpoint, engine = Path(folder) / "checkpoint", Path(folder) / "engine"
            write_sparse_checkpoint(checkpoint, with_layers(PRESETS[arguments.preset], layers))
            build_sparse_engine(checkpoint, engine, arguments.precision)
            size = sum(path.stat().st_size for path in engine.iterdir())
            started = time.perf_counter()
            anonymous, resident = peaks_mb(engine, checkpoint, arguments.tokens)
            return {
                "peak MB": resident,
                "in no file MB": anonymous,
                "verify s": time.perf_counter() - started,
                "engine GB": size / 1e9,
            }

    return measured


def with_layers(config: NvlmConfig, layers: int) -> NvlmConfig:
    vision = replace(config.vision, num_layers=layers)
    return replace(config, vision=vision, llm=replace(config.llm, num_layers=layers))


def build_sparse_engine(checkpoint: Path, output: Path, precision: str) -> None:
    """Builds an engine of a checkpoint of zeros, and gives the disk back what each tensor of zeros takes."""
    folder = output.parent / f".{output.name}.unfinished" / "engine"
    ends: dict[str, int] = {}

    def dig(stage: str, done: float, total: float) -> None:
        """The rows of a transposed tensor are written in several places: the whole file is searched at its end."""
        file = folder / f"{stage}.onnx.data"
        begin, end = 0 if done == total else ends.get(stage, 0), int(done)
        if end > begin and file.exists():
            subprocess.run(["fallocate", "-d", "-o", str(begin), "-l", str(end - begin), file], check=True)
        ends[stage] = end

    build_engine(checkpoint, output, precision=precision, smoke_test=False, progress=dig)


def peaks_mb(engine: Path, checkpoint: Path, tokens: int) -> tuple[float, float]:
    """Returns the most memory that a comparison took: in no file, and in all."""
    command = [sys.executable, "-c", VERIFY + HIGH_WATER, str(engine), str(checkpoint), str(tokens)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if process.returncode:
        raise EngineError(f"the comparison ended with status {process.returncode}; its last messages are above")
    anonymous, resident = (int(line) * 1024 / 1e6 for line in process.stdout.split())
    return anonymous, resident


if __name__ == "__main__":
    if shutil.which("fallocate") is None:
        sys.exit("error: needs fallocate of util-linux")
    run(options(), measure, RESULT, PACKAGES)
