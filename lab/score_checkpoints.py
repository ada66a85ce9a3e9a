"""Scores the shipped checkpoints on TinyDocs' test split and writes the scores into their model cards.

    python -m lab.score_checkpoints --work WORK [--publish]

For each checkpoint, the command builds the ONNX Runtime engine (fp32), answers the test split with the engine and with
the PyTorch reference, counts the answers in which both agree, and prints the table; --publish replaces the table in the
card. WORK keeps engines and results: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab.code_state import ROOT
from lab.common import one_line_errors
from lab.origin import Origin
from lab.run_file import RunFile, set_aside

RESULT = "score_checkpoints.json"
NAMES = ("nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny")
AIMS = {"nvlm-d-tiny": 0.95, "nvlm-x-tiny": 0.9, "nvlm-h-tiny": 0.9}  # least score of every task with images
TEXT_AIM = 0.99
BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"


def main() -> None:
    arguments = options().parse_args()
    with one_line_errors():
        work = arguments.work.absolute()
        file = RunFile(work / "results" / RESULT, Origin.here({"count": arguments.count}))
        if not file.resume(lambda record: None, lambda record: f"{len(record['scores'])} checkpoints are scored"):
            for name in NAMES:
                set_aside_answers(work, name)
            file.keep({"scores": {}})
        for name in NAMES:
            document, agreement = score(name, work, arguments.count)
            scores = file.record.get("scores", {}) | {name: document["summary"]}
            file.keep({"scores": scores})
            text = table(document, agreement, AIMS[name])
            print(f"{name}: {file.origin_line()}", "", text, "", sep="\n")
            if arguments.publish:
                write_table(ROOT / "checkpoints" / name / "README.md", text)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps engines and results")
    parser.add_argument("--count", type=int, default=200, help="samples per task")
    parser.add_argument("--publish", action="store_true", help="write the tables into the model cards")
    return parser


def answers_files(work: Path, name: str) -> tuple[Path, Path]:
    """Names the results of `nvlm-trt eval`: the engine's and the reference's."""
    return work / f"{name}-engine.json", work / f"{name}-reference.json"


def set_aside_answers(work: Path, name: str) -> None:
    """Renames answers of another origin, finished or not: `nvlm-trt eval` would go on with them."""
    for path in answers_files(work, name):
        for found in (path, path.with_name(f"{path.name}.partial")):
            if found.exists():
                set_aside(found)


def score(name: str, work: Path, count: int) -> tuple[dict[str, Any], str]:
    """Returns the engine's results, and the number of answers that equal the reference's."""
    checkpoint, engine = ROOT / "checkpoints" / name, work / name
    results, reference = answers_files(work, name)
    run("build", "--checkpoint", checkpoint, "--output", engine, "--overwrite")
    run("eval", "--engine", engine, "--count", count, "--output", results)
    run("eval", "--reference", checkpoint, "--count", count, "--output", reference)
    document = json.loads(results.read_text())
    expected = {answer["name"]: answer["answer"] for answer in json.loads(reference.read_text())["answers"]}
    equal = sum(expected[answer["name"]] == answer["answer"] for answer in document["answers"])
    return document, f"{equal} of {len(expected)}"


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "nvlm_trt.cli", *map(str, arguments)], check=True, cwd=ROOT)


def table(document: dict[str, Any], agreement: str, aim: float) -> str:
    summary = document["summary"]
    lines = ["| task | exact match | 95 % interval |", "|---|---|---|"]
    for task in summary["tasks"]:
        lines.append(_row(task["task"], task))
    for group, title in (("image", "mean of the tasks with images"), ("text", "mean of the text-only tasks")):
        lines.append(_row(f"**{title}**", summary[group]))
    count = summary["tasks"][0]["count"]
    lines += ["", f"{count} samples a task, test split: fonts and seeds not trained on. ONNX Runtime engine, fp32;"]
    lines += [f"{agreement} of its answers are the PyTorch reference's, character by character."]
    missed = [
        f"`{task['task']}`"
        for task in summary["tasks"]
        if task["score"] < (aim if task["kind"] == "image" else TEXT_AIM)
    ]
    if missed:
        aims = f"{aim:.0%} with images, {TEXT_AIM:.0%} without".replace("%", " %")
        lines += ["", f"Below the aim ({aims}): {', '.join(missed)}."]
    return "\n".join(lines)


def _row(title: str, score: dict[str, float]) -> str:
    return f"| {title} | {score['score']:.1%} | {score['low']:.1%} to {score['high']:.1%} |".replace("%", " %")


def write_table(card: Path, text: str) -> None:
    before, _, rest = card.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    card.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
