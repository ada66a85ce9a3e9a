"""What every precision costs and gains: engines of each checkpoint in each precision, measured, as a table.

    python lab/quantization_table.py --work /tmp/nvlm-quantization checkpoints/nvlm-{d,x,h}-tiny

Engines are kept below --work and every row is written to --json when it is measured: the same command goes on where it
was interrupted. At the end the table replaces what stands between the markers of docs/quantization.md.

Accuracy is that of `nvlm-trt eval` on TinyDocs' test split, which no calibration and no gate has seen. Token agreement
is the share of tokens that are the same when the engine is fed the fp32 engine's answer, so that one early difference
does not count for the rest; the cosines are of the image tokens and of the logits on the way. Speeds are medians, of
one prompt with a picture (TTFT, encoding included) and of decoding one request; all engines of a checkpoint take turns,
and every run of this measures them anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvlm_trt.api import Message
from nvlm_trt.backends.base import Backend
from nvlm_trt.backends.opening import open_backend
from nvlm_trt.builders.engine_build import QuantizationOptions, build_engine
from nvlm_trt.checkpoint.reader import Checkpoint
from nvlm_trt.engine import CALIBRATION, Engine
from nvlm_trt.evaluation.accuracy import EvalOptions, evaluate, run_header
from nvlm_trt.evaluation.answerers import EngineAnswerer
from nvlm_trt.evaluation.results import ResultsFile
from nvlm_trt.evaluation.samples import Sample, digest_of
from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS, generate
from nvlm_trt.image.decoding import load_image
from nvlm_trt.image.tiling import tile_image
from nvlm_trt.prompt.encoder import EncodedPrompt, PromptEncoder
from nvlm_trt.prompt.image_tokens import split_tiles
from nvlm_trt.prompt.tokenizer import Tokenizer
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
BEGIN, END = "<!-- quantization table: begin -->", "<!-- quantization table: end -->"
DOCUMENT = Path(__file__).parent.parent / "docs" / "quantization.md"
RESULTS = Path(__file__).parent / "results" / "quantization.json"
TOKENS = 8  # of an answer that are compared
STEPS = 32  # of decoding that are timed together
ROUNDS = 15


@dataclass(frozen=True)
class Trace:
    """What an engine computes on the way to an answer."""

    image_tokens: np.ndarray  # [tiles, T, hidden] of all images
    logits: np.ndarray  # [TOKENS, vocab]


def main() -> None:
    arguments = parse_arguments()
    saved: dict[str, dict[str, Any]] = {}
    if arguments.json.exists():
        saved = json.loads(arguments.json.read_text())["rows"]
    asked = [checkpoint.name for checkpoint in arguments.checkpoints]
    # of those that are measured now, only what belongs to their present weights
    rows = {key: row for key, row in saved.items() if row["checkpoint"] not in asked}
    for checkpoint in arguments.checkpoints:
        with Checkpoint.open(checkpoint) as source:
            digest = source.digest
        of_checkpoint = []
        for precision in arguments.precisions:
            key = f"{checkpoint.name} {precision} {digest[:12]} n={arguments.count} threads={arguments.threads}"
            rows[key] = saved.get(key) or {
                "checkpoint": checkpoint.name,
                "precision": precision,
                **measure(arguments, checkpoint, precision),
            }
            of_checkpoint.append(rows[key])
            save(arguments, saved | rows)
            print(f"{checkpoint.name} {precision}: {summary_line(rows[key])}", flush=True)
        engines = [built(arguments, checkpoint, row["precision"]) for row in of_checkpoint]
        for row, times in zip(of_checkpoint, speeds(engines, arguments.threads), strict=True):
            row |= times
    save(arguments, rows)
    if arguments.document:
        write_table(arguments.document, list(rows.values()), arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, required=True, help="keeps the engines between runs")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, help="as for `nvlm-trt build --precision`")
    parser.add_argument("--count", type=int, default=50, help="samples per task")
    parser.add_argument("--compared", type=int, default=4, help="samples per task whose logits are compared")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="gets the table between its markers")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, checkpoint: Path, precision: str) -> dict[str, Any]:
    engine = built(arguments, checkpoint, precision)
    reference = built(arguments, checkpoint, "fp32")
    compared = list(generate("test", count=arguments.compared))
    size = sum(record.size for name, record in engine.manifest.files.items() if name.endswith((".onnx", ".data")))
    return {
        "engine_mb": size / 1e6,
        **accuracy(arguments, engine),
        **agreement(reference, engine, compared, arguments.threads),
    }


def built(arguments: argparse.Namespace, checkpoint: Path, precision: str) -> Engine:
    """An engine below --work; all precisions of a checkpoint share one calibration. Ungated: it is measured here."""
    output = arguments.work / checkpoint.name / precision.replace("=", "-").replace(",", "+")
    if not output.exists():
        saved = arguments.work / f"{checkpoint.name}.{CALIBRATION}"
        options = QuantizationOptions(calibration=saved if saved.exists() else None, gate=None)
        with draw_progress() as progress:
            build_engine(checkpoint, output, precision=precision, quantization=options, progress=progress)
        if (output / CALIBRATION).exists() and not saved.exists():
            saved.write_bytes((output / CALIBRATION).read_bytes())
    return Engine.open(output)


def accuracy(arguments: argparse.Namespace, engine: Engine) -> dict[str, Any]:
    """Scores by task; answers are kept beside the engine, so that an interrupted run goes on."""
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


def agreement(reference: Engine, engine: Engine, samples: Sequence[Sample], threads: int) -> dict[str, float]:
    """Both engines along the reference's answers."""
    answers = [np.argmax(trace.logits, axis=1) for trace in traces(reference, samples, None, threads)]
    same, image_cosines, logit_cosines = [], [], []
    pairs = zip(traces(reference, samples, answers, threads), traces(engine, samples, answers, threads), strict=True)
    for expected, actual in pairs:
        same.append(np.mean(expected.logits.argmax(1) == actual.logits.argmax(1)))
        logit_cosines.append(cosine(expected.logits, actual.logits))
        if len(expected.image_tokens):
            image_cosines.append(cosine(expected.image_tokens, actual.image_tokens))
    return {
        "token_agreement": float(np.mean(same)),
        "image_token_cosine": float(np.mean(image_cosines)),
        "logit_cosine": float(np.mean(logit_cosines)),
    }


def traces(
    engine: Engine, samples: Sequence[Sample], answers: Sequence[np.ndarray] | None, threads: int
) -> Iterator[Trace]:
    """One per sample, along `answers` [TOKENS] each, or greedily."""
    with open_backend(engine, threads=threads) as backend:
        prompts = PromptEncoder(engine.config, Tokenizer.from_directory(engine.path))
        for index, sample in enumerate(samples):
            images = [encode(backend, data) for data in sample.images]
            prompt = prompts.encode([Message("user", sample.prompt)], [len(image) for image in images])
            logits = [without_image_token(backend, prefill(backend, prompt, images))]
            ranges = np.array([PromptEncoder.decode_range(prompt)], np.int32)
            for step in range(TOKENS - 1):
                token = answers[index][step] if answers else logits[-1].argmax()
                position = np.array([len(prompt.input_ids) + step])
                logits.append(without_image_token(backend, backend.decode(np.array([token]), position, ranges)[0]))
            tokens = np.concatenate(images) if images else np.zeros((0,), np.float32)
            yield Trace(tokens, np.array(logits))


def speeds(engines: Sequence[Engine], threads: int) -> list[dict[str, float]]:
    """Of each engine, medians over ROUNDS in which all take their turn, after a round that warms up."""
    sample = next(sample for sample in generate("test", count=1) if sample.images)
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in engines]
    with contextlib.ExitStack() as opened:
        backends = [opened.enter_context(open_backend(engine, threads=threads)) for engine in engines]
        prompts = PromptEncoder(engines[0].config, Tokenizer.from_directory(engines[0].path))
        for _ in range(ROUNDS + 1):
            for backend, (first_token, token) in zip(backends, times, strict=True):
                started = time.perf_counter()
                images = [encode(backend, data) for data in sample.images]
                prompt = prompts.encode([Message("user", sample.prompt)], [len(image) for image in images])
                last = without_image_token(backend, prefill(backend, prompt, images)).argmax()
                first_token.append(time.perf_counter() - started)
                ranges = np.array([PromptEncoder.decode_range(prompt)], np.int32)
                started = time.perf_counter()
                for step in range(STEPS):
                    position = np.array([len(prompt.input_ids) + step])
                    last = without_image_token(backend, backend.decode(np.array([last]), position, ranges)[0]).argmax()
                token.append((time.perf_counter() - started) / STEPS)
    return [
        {"ttft_ms": 1e3 * statistics.median(first_token[1:]), "tokens_per_s": 1 / statistics.median(token[1:])}
        for first_token, token in times
    ]


def encode(backend: Backend, data: bytes) -> np.ndarray:
    """[tiles, T, hidden] of one picture."""
    return backend.encode(tile_image(load_image(data), backend.config.vision.image_size, backend.limits.max_tiles))


def prefill(backend: Backend, prompt: EncodedPrompt, images: Sequence[np.ndarray]) -> np.ndarray:
    """A whole prompt in slot 0 -> logits [vocab]."""
    hidden = backend.config.llm.hidden_size
    llm_tokens, start = [np.zeros((0, hidden), np.float32)], 0
    for tokens in images:
        in_llm, in_cross = split_tiles(backend.config.architecture, len(tokens))
        llm_tokens.append(tokens[in_llm].reshape(-1, hidden))
        if len(tokens[in_cross]):
            cross_kv = backend.cross_kv(tokens[in_cross])
            backend.write_cross_kv(0, start, cross_kv)
            start += cross_kv.shape[3]
    return backend.prefill(0, 0, prompt.input_ids, np.concatenate(llm_tokens), prompt.cross_ranges)


def without_image_token(backend: Backend, logits: np.ndarray) -> np.ndarray:
    """A copy in which the image token, which is never sampled, is the least likely."""
    logits = logits.copy()
    logits[backend.config.image_token_id] = logits.min()
    return logits


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def save(arguments: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    document = {"machine": machine(arguments), "samples_per_task": arguments.count, "rows": rows}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=2) + "\n")
    os.replace(temporary, arguments.json)


def machine(arguments: argparse.Namespace) -> str:
    import onnxruntime

    return f"{platform.machine()}, {arguments.threads} threads, ONNX Runtime {onnxruntime.__version__}"


def summary_line(row: dict[str, Any]) -> str:
    return f"images {row['image_score']:.3f}, text {row['text_score']:.3f}, {row['engine_mb']:.1f} MB"


def write_table(path: Path, rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Two tables per checkpoint: sizes, agreement and speed; accuracy by task."""
    lines = [f"{machine(arguments)}; {arguments.count} samples of each task of TinyDocs' test split.", ""]
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        of_checkpoint = [row for row in rows if row["checkpoint"] == checkpoint]
        lines += [f"**{checkpoint}**", "", *overview(of_checkpoint), "", *by_task(of_checkpoint), ""]
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{chr(10).join(lines)}{END}{after}", encoding="utf-8")


def overview(rows: Sequence[dict[str, Any]]) -> list[str]:
    agreeing = "tokens as fp32 | cosine of image tokens | of logits"
    return [
        f"| `--precision` | MB | images | text | {agreeing} | TTFT ms | tokens/s |",
        "|---" * 9 + "|",
        *(
            f"| `{row['precision']}` | {row['engine_mb']:.1f} | {100 * row['image_score']:.1f} % "
            f"| {100 * row['text_score']:.1f} % | {100 * row['token_agreement']:.1f} % "
            f"| {row['image_token_cosine']:.5f} | {row['logit_cosine']:.5f} | {row['ttft_ms']:.1f} "
            f"| {row['tokens_per_s']:.0f} |"
            for row in rows
        ),
    ]


def by_task(rows: Sequence[dict[str, Any]]) -> list[str]:
    tasks = (*TASKS, *TEXT_TASKS)
    lines = [f"| % right | {' | '.join(f'`{task}`' for task in tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for row in rows:
        scores = " | ".join(f"{100 * row['tasks'][task]:.0f}" for task in tasks)
        lines.append(f"| `{row['precision']}` | {scores} |")
    return lines


if __name__ == "__main__":
    main()
