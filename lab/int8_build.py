"""Measures how long a build in int8 takes with its defaults, calibration and gate included, now and at a commit before.

    python -m lab.int8_build --work WORK

`now` is a build of this checkout, measured from the beginning to the end. `before` is a git worktree of --before, run
by the same Python. Its time is linear in the samples, all of which it uses, and hours long: it gets --few of each kind,
and its total is `rest` + samples * time per sample. Opening an engine for the gate counts as rest. `all samples s` is
the same sum for both: what a build takes if nothing lets it end its calibration or its gate early.

The checkpoint has random weights. Its scores are 0, so the gate ends as soon as that is beyond doubt. The gate of a
trained model that loses little asks all of its samples: `all samples s` is nearer to its time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.code_state import ROOT
from lab.common import parser, run
from lab.engines import random_checkpoint
from lab.rounds import Contender, Rounds
from nvlm_trt.builders.engine_build import CALIBRATION_SAMPLES
from nvlm_trt.builders.quantization.gate import DOCUMENT_SAMPLES
from nvlm_trt.errors import EngineError

RESULT = "int8_build.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "onnx", "numpy")
BEFORE = "b032f91"
TOTAL, ALL_SAMPLES = "total s", "all samples s"

# Runs at both commits. Prints [seconds since the start, description, done] of every report of progress, the seconds
# that opening engines took, and the samples that were used.
BUILD = """
import json, sys, time
from pathlib import Path
import nvlm_trt
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.gate import GateOptions
from nvlm_trt.runtime.pipeline import Pipeline

root, checkpoint, output, calibration_samples, gate_samples = sys.argv[1:]
assert Path(nvlm_trt.__file__).is_relative_to(root), nvlm_trt.__file__
real, opening, events = Pipeline.open.__func__, [0.0], []

def timed(cls, *arguments, **options):
    begin = time.perf_counter()
    try:
        return real(cls, *arguments, **options)
    finally:
        opening[0] += time.perf_counter() - begin

Pipeline.open = classmethod(timed)
start = time.perf_counter()
report = lambda description, done, total: events.append([time.perf_counter() - start, description, done])
quantization = QuantizationOptions(
    calibration_samples=int(calibration_samples), gate=GateOptions(count=int(gate_samples))
)
engine = build_engine(checkpoint, output, precision="int8", progress=report, quantization=quantization)
report("published", 1, 1)
manifest = engine.manifest
used = [manifest.calibration["samples"]["count"], manifest.accuracy_gate["samples"]["count"]]
print(json.dumps({"events": events, "opening": opening[0], "used": used, "result": manifest.accuracy_gate["result"]}))
"""


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--before", default=BEFORE, help="commit to compare with")
    made.add_argument("--few", type=int, default=14, help="samples of each kind for the commit before")
    made.add_argument("--calibration-samples", type=int, default=CALIBRATION_SAMPLES, help="as for `nvlm-trt build`")
    made.add_argument("--gate-samples", type=int, default=DOCUMENT_SAMPLES, help="as for `nvlm-trt build`")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    checkpoint = random_checkpoint(arguments.work, arguments.preset)
    before = worktree(arguments.work / "before", arguments.before)
    wanted = (arguments.calibration_samples, arguments.gate_samples)
    output = arguments.work / "int8_build"
    contenders = {
        "before": contender(before, checkpoint, output, (arguments.few, arguments.few), wanted),
        "now": contender(ROOT, checkpoint, output, wanted, wanted),
    }
    rounds.run(contenders, arguments.rounds, warm_up=False)  # a warm-up would build everything twice
    rounds.report([(TOTAL, "now", "before"), (ALL_SAMPLES, "now", "before")], before=arguments.before)


def worktree(path: Path, commit: str) -> Path:
    """Checks out a commit below --work. Raises EngineError if git cannot."""
    if path.exists():
        shutil.rmtree(path)
    subprocess.run(["git", "-C", str(ROOT), "worktree", "prune"], check=False)
    command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(path), commit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EngineError(f"git cannot check out {commit} ({reason}); name a commit of this repository with --before")
    return path


def contender(
    root: Path, checkpoint: Path, output: Path, samples: tuple[int, int], wanted: tuple[int, int]
) -> Contender:
    """Builds with the code of `root`. `samples`: to calibrate on and to judge by, at most; `wanted`: by default."""

    def measured() -> Mapping[str, float]:
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-c", BUILD, root, checkpoint, output, *samples]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        process = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
        shutil.rmtree(output, ignore_errors=True)
        if process.returncode:
            raise EngineError(f"the build of {root} ended with status {process.returncode}; its messages are above")
        return summary(json.loads(process.stdout), samples, wanted)

    return measured


def summary(record: Mapping[str, Any], samples: tuple[int, int], wanted: tuple[int, int]) -> dict[str, float]:
    """Divides the time of a build among its parts, and adds it up for the `wanted` samples."""
    seconds = parts(record["events"])
    used = record["used"]
    gate = seconds["gate"] - record["opening"]
    per_sample = (seconds["calibration"] / used[0], gate / used[1])
    rest = seconds["rest"] + record["opening"]
    all_samples = rest + sum(each * count for each, count in zip(per_sample, wanted, strict=True))
    return {
        TOTAL: seconds["whole"] if samples == wanted else all_samples,
        ALL_SAMPLES: all_samples,
        "measured s": seconds["whole"],
        "calibration samples": float(used[0]),
        "calibration s per sample": per_sample[0],
        "gate samples": float(used[1]),
        "gate s per sample": per_sample[1],
        "rest s": rest,
    }


def parts(events: Sequence[tuple[float, str, float]]) -> dict[str, float]:
    """Adds up the time before each report of progress, by what it reports as done: calibration, gate, rest, whole."""
    seconds = {"calibration": 0.0, "gate": 0.0, "rest": 0.0}
    previous = 0.0
    for now, description, done in events:
        part = "rest"
        if done and description == "calibrating":
            part = "calibration"
        elif done and description.startswith("accuracy gate"):
            part = "gate"
        seconds[part] += now - previous
        previous = now
    return {**seconds, "whole": previous}


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
