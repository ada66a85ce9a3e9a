"""Writes the tables and the plot of docs/paper.md: the paper's effects in our own tiny models.

`python -m training.paper --work DIR --scores DIR` reads the ablations (`python -m training.ablation`) and scores
(`python -m lab.score_checkpoints`), asks the language models of all stages the text-only tasks, times the engines'
prefill, and writes docs/paper.json, docs/images/paper.png, and docs/paper.md after the template training/paper.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot

from nvlm_trt.api import ChatRequest, Message, SamplingParams, Usage
from nvlm_trt.evaluation.tinydocs import TEXT_TASKS, generate
from nvlm_trt.evaluation.tinydocs.kinds import Question
from nvlm_trt.prompt.encoder import PromptEncoder
from nvlm_trt.prompt.tokenizer import Tokenizer
from nvlm_trt.runtime.pipeline import Pipeline
from training.ablation import VARIANTS
from training.accuracy import right_answers
from training.batch import collate
from training.packer import Packer
from training.run import Run

ROOT = Path(__file__).parent.parent
MODELS = ("d", "x", "h")
TEXT_TOKENS = 1024  # the paper's Table 3: 1,024 text tokens, 6 + 1 tiles
REAL_LENGTHS = ROOT / "lab" / "results" / "architectures.json"  # tiles of 256 tokens
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.paper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="WORK of python -m training")
    parser.add_argument("--scores", type=Path, required=True, help="WORK of lab.score_checkpoints")
    options = parser.parse_args()
    run = Run(options.work, torch.device("cpu"))
    document = {
        "tags": {name: json.loads((options.work / f"ablation-{name}.json").read_text()) for name in ("d", "x")},
        "text_only": {stage: text_only(run, stage) for stage in ("language", *(f"tune-{name}" for name in MODELS))},
        "architectures": compare_architectures(options.scores),
    }
    (ROOT / "docs" / "paper.json").write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    draw(document, ROOT / "docs" / "images" / "paper.png")
    template = (Path(__file__).parent / "paper.md").read_text(encoding="utf-8")
    (ROOT / "docs" / "paper.md").write_text(fill_in(template, document), encoding="utf-8")


@torch.no_grad()
def text_only(run: Run, stage: str) -> dict[str, float]:
    """Returns the exact match of a stage's language model on the text-only tasks of the test split."""
    model = run.new_model(stage.removeprefix("tune-") if stage.startswith("tune-") else "d")
    run.load(model, stage)
    packer = Packer(model.eval().config, run.tokenizer)
    scores = {}
    for task in TEXT_TASKS:
        asked = [Question(task, sample.prompt, sample.answer) for sample in generate("test", [task], 200)]
        groups = [packer.pack((), asked[start : start + 10]) for start in range(0, len(asked), 10)]
        scores[task] = float(right_answers(model, collate(groups), None, None).float().mean())
    return scores


def compare_architectures(scores: Path) -> dict[str, dict[str, Any]]:
    """Reads accuracies from the score files; measures sequence lengths and prefill times, the engines in turn."""
    table: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in MODELS}
    (sample,) = [s for s in generate("test", ["ocr"], 40) if s.name == _six_tile_sample()]
    pipelines = {name: Pipeline.open(scores / f"nvlm-{name}-tiny") for name in MODELS}
    try:
        requests = {}
        for name, pipeline in pipelines.items():
            question = _padded_question(scores / f"nvlm-{name}-tiny")
            requests[name] = ChatRequest([Message("user", question)], sample.images, SamplingParams(max_tokens=1))
            usage = _usage(pipeline, requests[name])  # encodes the image once; it is cached from here on
            summary = json.loads((scores / f"nvlm-{name}-tiny-engine.json").read_text())["summary"]
            table[f"NVLM-{name.upper()}"] = {
                "image": summary["image"]["score"],
                "text": summary["text"]["score"],
                "llm_tokens": usage.prompt_tokens,
                "cross_tokens": usage.cross_tokens,
            }
        for _ in range(ROUNDS):
            for name, pipeline in pipelines.items():
                ttft = _usage(pipeline, requests[name]).ttft_s
                assert ttft is not None
                times[name].append(ttft)
    finally:
        for pipeline in pipelines.values():
            pipeline.close()
    for name, values in times.items():
        table[f"NVLM-{name.upper()}"]["prefill_ms"] = statistics.median(values) * 1e3
    return table


def _six_tile_sample() -> str:
    from nvlm_trt.image.decoding import load_image
    from nvlm_trt.image.tiling import tile_count

    for sample in generate("test", ["ocr"], 40):
        image = load_image(sample.images[0])
        if tile_count(image.width, image.height, 56, 6) == 7:
            return sample.name
    raise AssertionError("one page in four has six tiles")


def _padded_question(engine: Path) -> str:
    """Makes a question that brings the prompt's text to TEXT_TOKENS tokens."""
    from nvlm_trt.engine import Engine

    tokenizer = Tokenizer.from_directory(engine)
    encoder = PromptEncoder(Engine.open(engine).config, tokenizer)
    own = len(encoder.encode([Message("user", "What is the sum?")]).input_ids)
    return " the" * (TEXT_TOKENS - own) + "What is the sum?"


def _usage(pipeline: Pipeline, request: ChatRequest) -> Usage:
    *_, last = pipeline.generate(request)
    assert last.usage is not None
    return last.usage


def draw(document: dict[str, Any], path: Path) -> None:
    figure, (tags, scatter) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for offset, (name, ablation) in enumerate(document["tags"].items()):
        means = [statistics.fmean(ablation["scores"][variant.name].values()) for variant in VARIANTS]
        bars = tags.bar([x + 0.38 * offset for x in range(len(means))], means, 0.36, label=f"NVLM-{name.upper()}")
        tags.bar_label(bars, [f"{mean:.0%}" for mean in means], fontsize=8)
    tags.set_xticks([x + 0.19 for x in range(len(VARIANTS))], [variant.name for variant in VARIANTS])
    tags.set(ylim=(0, 1.08), ylabel="exact match, small print", title="tiles and tags (paper: Tables 1 and 2)")
    tags.legend()
    for name, row in document["architectures"].items():
        scatter.scatter(row["prefill_ms"], row["image"], s=60)
        scatter.annotate(
            f"{name}, {row['llm_tokens']:,} tokens",
            (row["prefill_ms"], row["image"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    scatter.set(xlabel="prefill, ms", ylabel="mean of image tasks", title="architectures (paper: Table 3)")
    scatter.margins(0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def fill_in(template: str, document: dict[str, Any]) -> str:
    """Puts each table where the template says {NAME}."""
    return (
        template.replace("{tags}", _tags_table(document["tags"]))
        .replace("{steps}", _steps(document["tags"]))
        .replace("{text_only}", _text_table(document["text_only"]))
        .replace("{architectures}", _architectures_table(document["architectures"]))
        .replace("{real_lengths}", _real_lengths_table(json.loads(REAL_LENGTHS.read_text())))
    )


def _tags_table(tags: dict[str, Any]) -> str:
    tasks = list(next(iter(tags.values()))["scores"][VARIANTS[0].name])
    lines = [f"| | {' | '.join(tasks)} | mean |", "|---|" + "---|" * (len(tasks) + 1)]
    for name, ablation in tags.items():
        for variant in VARIANTS:
            scores = ablation["scores"][variant.name]
            cells = [*scores.values(), statistics.fmean(scores.values())]
            lines.append(f"| NVLM-{name.upper()}, {variant.name} | " + " | ".join(map(_percent, cells)) + " |")
    return "\n".join(lines)


def _steps(tags: dict[str, Any]) -> str:
    return " and ".join(f"{ablation['steps']:,} steps of {ablation['model']}" for ablation in tags.values())


def _text_table(text_only: dict[str, dict[str, float]]) -> str:
    titles = {"language": "language model before any image", **{f"tune-{n}": f"NVLM-{n.upper()}" for n in MODELS}}
    lines = [f"| | {' | '.join(TEXT_TASKS)} | mean |", "|---|" + "---|" * (len(TEXT_TASKS) + 1)]
    for stage, scores in text_only.items():
        cells = [*scores.values(), statistics.fmean(scores.values())]
        lines.append(f"| {titles[stage]} | " + " | ".join(map(_percent, cells)) + " |")
    return "\n".join(lines)


def _architectures_table(table: dict[str, dict[str, Any]]) -> str:
    lines = ["| | tasks with images | text-only tasks | LLM tokens | cross-attended | prefill | x D |", "|---|" * 7]
    lines[1] = "|---" * 7 + "|"
    for name, row in table.items():
        speed = table["NVLM-D"]["prefill_ms"] / row["prefill_ms"]
        lines.append(
            f"| {name} | {_percent(row['image'])} | {_percent(row['text'])} | {row['llm_tokens']:,} | "
            f"{row['cross_tokens']} | {row['prefill_ms']:.0f} ms | {speed:.2f} |"
        )
    return "\n".join(lines)


def _real_lengths_table(benchmark: dict[str, Any]) -> str:
    """Tabulates the first precision of lab.architectures."""
    metric = "prefill ms"
    times = {name: summary[metric]["median"] for name, summary in benchmark["summary"].items()}
    lines = ["| | LLM tokens | cross-attended | KV cache | prefill | x D |", "|---" * 6 + "|"]
    for name in list(times)[: len(MODELS)]:
        request = benchmark["requests"][name]
        ratios = [r["median"] for r in benchmark["ratios"] if (r["metric"], r["to"]) == (metric, name)]
        lines.append(
            f"| {name.upper().split()[0].replace('SMALL', 'small')} | {request['sequence_tokens']:,} | "
            f"{request['cross_tokens']:,} | {request['kv_bytes'] / 1e6:.0f} MB | {times[name] / 1e3:.1f} s | "
            f"{next(iter(ratios), 1.0):.2f} |"
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


if __name__ == "__main__":
    main()
