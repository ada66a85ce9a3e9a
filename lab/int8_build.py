"""Measures how long a build in int8 takes with its defaults, calibration and gate included, now and at a commit before.

    python -m lab.int8_build --work WORK

`before` is a git worktree of --before, run by the same Python. Its time is linear in the samples, all of which it uses,
and hours long: it gets --few of each kind, and its total is `rest` + samples * time per sample. `now, few samples` is
this checkout with as few, for the time per sample; `now` is a whole build, measured from the beginning to the end.
Opening an engine for the gate counts as rest. `all samples s` is the same sum for each: what a build takes if nothing
lets it end its calibration or its gate early. Core seconds are those of all threads of the build together: other work
on the machine changes them less.

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
COMPARED = ("total s", "total core s", "all samples s", "all samples core s")

# Runs at both commits. Prints every report of progress as [seconds since the start, seconds of all threads on a core,
# description, done], both kinds of seconds that opening engines took, and the samples that were used.
BUILD = """
import json, sys, time
from pathlib import Path
import nvlm_trt
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.builders.quantization.gate import GateOptions
from nvlm_trt.runtime.pipeline import Pipeline

root, checkpoint, output, calibration_samples, gate_samples = sys.argv[1:]
assert Path(nvlm_trt.__file__).is_relative_to(root), nvlm_trt.__file__
real, opening, events = Pipeline.open.__func__, [0.0, 0.0], []

def clocks():
    return [time.perf_counter() - start, time.process_time()]

def timed(cls, *arguments, **options):
    begin = clocks()
    try:
        return real(cls, *arguments, **options)
    finally:
        opening[:] = [total + now - then for total, now, then in zip(opening, clocks(), begin)]

Pipeline.open = classmethod(timed)
start = time.perf_counter()
report = lambda description, done, total: events.append([*clocks(), description, done])
quantization = QuantizationOptions(
    calibration_samples=int(calibration_samples), gate=GateOptions(count=int(gate_samples))
)
engine = build_engine(checkpoint, output, precision="int8", progress=report, quantization=quantization)
report("published", 1, 1)
manifest = engine.manifest
used = [manifest.calibration["samples"]["count"], manifest.accuracy_gate["samples"]["count"]]
print(json.dumps({"events": events, "opening": opening, "used": used, "result": manifest.accuracy_gate["result"]}))
"""


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("--preset", default="nvlm-d-small")
    made.add_argument("--before", default=BEFORE, help="commit to compare with")
    made.add_argument("--few", type=int, default=14, help="samples of each kind where not all are used")
    made.add_argument("--calibration-samples", type=int, default=CALIBRATION_SAMPLES, help="as for `nvlm-trt build`")
    made.add_argument("--gate-samples", type=int, default=DOCUMENT_SAMPLES, help="as for `nvlm-trt build`")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    checkpoint = random_checkpoint(arguments.work, arguments.preset)
    before = worktree(arguments.work / "before", arguments.before)
    wanted = (arguments.calibration_samples, arguments.gate_samples)
    output = arguments.work / "int8_build"
    few = (arguments.few, arguments.few)
    contenders = {
        "before": contender(before, checkpoint, output, few, wanted),
        "now, few samples": contender(ROOT, checkpoint, output, few, wanted),
        "now": contender(ROOT, checkpoint, output, wanted, wanted),
    }
    rounds.run(contenders, arguments.rounds, warm_up=False)  # a warm-up would build everything twice
    rounds.report([(metric, "now", "before") for metric in COMPARED], before=arguments.before)


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
    values = {"calibration samples": float(record["used"][0]), "gate samples": float(record["used"][1])}
    for clock, unit in enumerate(("s", "core s")):
        seconds = parts([(event[clock], event[2], event[3]) for event in record["events"]])
        opening = record["opening"][clock]
        per_sample = {
            "calibration": seconds["calibration"] / record["used"][0],
            "gate": (seconds["gate"] - opening) / record["used"][1],
        }
        rest = seconds["rest"] + opening
        all_samples = rest + sum(each * count for each, count in zip(per_sample.values(), wanted, strict=True))
        values |= {
            f"total {unit}": seconds["whole"] if samples == wanted else all_samples,
            f"all samples {unit}": all_samples,
            f"measured {unit}": seconds["whole"],
            **{f"{part} {unit} per sample": each for part, each in per_sample.items()},
            f"rest {unit}": rest,
        }
    return values


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
