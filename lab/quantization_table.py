"""Measures costs and gains of every precision: builds each checkpoint in each precision, and writes a table.

    python -m lab.quantization_table --work WORK checkpoints/nvlm-{d,x,h}-tiny

WORK keeps the engines, and every measured row: the same command goes on where it was interrupted. --publish writes
lab/results/quantization.json and replaces the tables between the markers of docs/quantization.md.

Accuracy is that of `nvlm-trt eval` on TinyDocs' test split, which no calibration and no gate has seen. Token agreement
is the share of equal tokens when the engine reads the fp32 engine's answer, so that one early difference does not count
in the tokens after it; the cosines compare the image tokens, and the answer's logits. Speeds are medians, of one
prompt with an image (TTFT, encoding included) and of decoding one request; all engines of a checkpoint take turns, and
every run measures all speeds anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.code_state import ROOT
from lab.common import RESULTS, one_line_errors, result_path, settings_of
from lab.engine_speed import speeds
from lab.engine_trace import agreement
from lab.engines import built_engine, checkpoint_digest
from lab.origin import Origin
from lab.quantization_page import replace_tables, tables
from lab.run_file import RunFile
from nvlm_trt.engine import Engine
from nvlm_trt.evaluation.accuracy import EvalOptions, evaluate, run_header
from nvlm_trt.evaluation.answerers import EngineAnswerer
from nvlm_trt.evaluation.results import ResultsFile
from nvlm_trt.evaluation.samples import digest_of
from nvlm_trt.evaluation.tinydocs import generate
from nvlm_trt.terminal import progress as draw_progress

PRECISIONS = (
    "fp32",
    "int8",
    "int8,vision_encoder=int8",
    "int8,vision_encoder=int8,projector=int8,lm_head=int8",
    "int8-weight-only",
    "int4-weight-only",
    "fp8",
    "fp8,vision_encoder=fp8",
)
RESULT = "quantization.json"
DOCUMENT = ROOT / "docs" / "quantization.md"
Row = dict[str, Any]


def main() -> None:
    arguments = options().parse_args()
    with one_line_errors():
        arguments.work = arguments.work.absolute()
        settings = {name: value for name, value in settings_of(arguments).items() if name != "document"}
        settings["checkpoints"] = {path.name: checkpoint_digest(path)[:12] for path in arguments.checkpoints}
        file = RunFile(result_path(arguments, RESULT), Origin.here(settings))
        rows = measured_rows(arguments, file, settings["checkpoints"])
        text = tables(list(rows.values()), file.origin_line(), arguments.count)
        print(text)
        if arguments.publish:
            file.copy(RESULTS / RESULT)
            replace_tables(arguments.document, text)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps engines and results")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, help="as for `nvlm-trt build --precision`")
    parser.add_argument("--count", type=int, default=50, help="samples per task")
    parser.add_argument("--compared", type=int, default=4, help="samples per task whose logits are compared")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="file of this run [WORK/results/quantization.json]")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="page that gets the tables with --publish")
    parser.add_argument("--publish", action="store_true", help="write lab/results and the page")
    return parser


def measured_rows(arguments: argparse.Namespace, file: RunFile, digests: Mapping[str, str]) -> dict[str, Row]:
    """Measures the rows that the file does not hold yet, and all speeds. `digests`: checkpoint's name -> digest."""
    rows: dict[str, Row] = {}
    if file.resume(lambda record: None, lambda record: f"{len(record['rows'])} rows are there"):
        rows = file.record["rows"]
    for checkpoint in arguments.checkpoints:
        of_checkpoint, engines = [], []
        for precision in arguments.precisions:
            settings = f"n={arguments.count} threads={arguments.threads}"
            key = f"{checkpoint.name} {precision} {digests[checkpoint.name]} {settings}"
            engine = built(arguments, checkpoint, precision)
            if key not in rows:
                measured = measure(arguments, checkpoint, engine)
                rows[key] = {"checkpoint": checkpoint.name, "precision": precision, **measured}
                file.keep({"samples_per_task": arguments.count, "rows": rows})
            print(f"{checkpoint.name} {precision}: {summary_line(rows[key])}", file=sys.stderr, flush=True)
            of_checkpoint.append(rows[key])
            engines.append(engine)
        for row, times in zip(of_checkpoint, speeds(engines, arguments.threads), strict=True):
            row |= times
        file.keep({"rows": rows})
    return rows


def measure(arguments: argparse.Namespace, checkpoint: Path, engine: Engine) -> Row:
    reference = built(arguments, checkpoint, "fp32")
    compared = list(generate("test", count=arguments.compared))
    size = sum(record.size for name, record in engine.manifest.files.items() if name.endswith((".onnx", ".data")))
    return {
        "engine_mb": size / 1e6,
        **accuracy(arguments, engine),
        **agreement(reference, engine, compared, arguments.threads),
    }


def built(arguments: argparse.Namespace, checkpoint: Path, precision: str) -> Engine:
    with draw_progress() as progress:
        return built_engine(arguments.work, checkpoint, precision, progress=progress)


def accuracy(arguments: argparse.Namespace, engine: Engine) -> Row:
    """Scores every task. Answers are kept beside the engine, so that an interrupted run goes on."""
    options = EvalOptions()
    with draw_progress() as progress:
        samples = list(generate("test", count=arguments.count))
        answerer = EngineAnswerer(engine.path, options.max_tokens)
        header = run_header(digest_of(samples), len(samples), answerer, options)
        results_path = engine.path.with_name(f"{engine.path.name}.{arguments.count}.json")
        with ResultsFile(results_path, header, [sample.name for sample in samples]) as results:
            summary = evaluate(samples, answerer, results, options, progress)
    image, text = summary.group("image"), summary.group("text")
    return {
        "tasks": {task.task: task.score for task in summary.tasks},
        "image_score": image.score if image else None,
        "text_score": text.score if text else None,
    }


def summary_line(row: Row) -> str:
    return f"images {row['image_score']:.3f}, text {row['text_score']:.3f}, {row['engine_mb']:.1f} MB"


if __name__ == "__main__":
    main()
