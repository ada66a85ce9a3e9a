"""Measures what quantising without a calibration costs: fp8 with one range for all activations, and weight-only.

    python -m lab.without_calibration --work WORK checkpoints/nvlm-{d,x,h}-tiny

Scores, token agreement and the cosine of logits are those of lab.quantization_table: TinyDocs' test split, against the
fp32 engine. WORK keeps the engines.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from lab.common import parser, run
from lab.engine_trace import agreement
from lab.engines import built_engine, checkpoint_digest, engines_folder
from lab.rounds import Contender, Rounds
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.engine import Engine
from nvlm_trt.evaluation.accuracy import EvalOptions, evaluate, run_header
from nvlm_trt.evaluation.answerers import EngineAnswerer
from nvlm_trt.evaluation.results import ResultsFile
from nvlm_trt.evaluation.samples import digest_of
from nvlm_trt.evaluation.tinydocs import generate

RESULT = "without_calibration.json"
PACKAGES = ("nvlm-trt", "onnxruntime", "numpy")
RANGES = (7.0, 28.0, 112.0, 448.0, 1792.0, 7168.0)  # the scale of 448 is 1
CALIBRATED = ("fp32", "fp8")
WEIGHT_ONLY = ("int8-weight-only", "int4-weight-only")


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, rounds=1)
    made.add_argument("checkpoints", nargs="+")
    made.add_argument("--count", type=int, default=50, help="samples per task")
    made.add_argument("--compared", type=int, default=4, help="samples per task whose logits are compared")
    return made


def measure(arguments: argparse.Namespace, rounds: Rounds) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    contenders = {}
    for checkpoint in map(Path, arguments.checkpoints):
        for precision in (*CALIBRATED, *WEIGHT_ONLY):
            contenders[f"{checkpoint.name} {precision}"] = contender(arguments, checkpoint, precision, None)
        for largest in RANGES:
            contenders[f"{checkpoint.name} fp8, range {largest:g}"] = contender(arguments, checkpoint, "fp8", largest)
    rounds.run(contenders, arguments.rounds, warm_up=False)
    rounds.report()


def contender(arguments: argparse.Namespace, checkpoint: Path, precision: str, largest: float | None) -> Contender:
    def measured() -> Mapping[str, float]:
        reference = built_engine(arguments.work, checkpoint, "fp32")
        engine = built(arguments.work, checkpoint, precision, largest)
        compared = agreement(reference, engine, list(generate("test", count=arguments.compared)), arguments.threads)
        return {
            **scores(engine, arguments.count),
            "tokens as fp32 %": 100 * compared["token_agreement"],
            "cosine of logits": compared["logit_cosine"],
        }

    return measured


def built(work: Path, checkpoint: Path, precision: str, largest: float | None) -> Engine:
    if largest is None:
        return built_engine(work, checkpoint, precision)
    output = engines_folder(work) / f"{checkpoint.name}-{checkpoint_digest(checkpoint)[:12]}-{precision}-{largest:g}"
    if not output.exists():
        quantization = QuantizationOptions(activation_range=largest, gate=None)
        build_engine(checkpoint, output, precision=precision, quantization=quantization)
    return Engine.open(output)


def scores(engine: Engine, count: int) -> Mapping[str, float]:
    evaluation = EvalOptions()
    samples = list(generate("test", count=count))
    answerer = EngineAnswerer(engine.path, evaluation.max_tokens)
    header = run_header(digest_of(samples), len(samples), answerer, evaluation)
    with ResultsFile(None, header, [sample.name for sample in samples]) as results:
        summary = evaluate(samples, answerer, results, evaluation, lambda *_: None)
    of_group = {name: summary.group(name) for name in ("image", "text")}
    return {f"{name}s %": 100 * group.score for name, group in of_group.items() if group is not None}


if __name__ == "__main__":
    run(options(), measure, RESULT, PACKAGES)
