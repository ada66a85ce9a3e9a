"""Score the shipped checkpoints on TinyDocs' test split and write the scores into their model cards.

    python lab/score_checkpoints.py --work DIR

For each checkpoint: build the ONNX Runtime engine (fp32), answer the test split with it and with the PyTorch
reference, check that both give the same answers, and replace the table in the card. DIR keeps engines and results; a
run that was cut goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = ("nvlm-d-tiny", "nvlm-x-tiny", "nvlm-h-tiny")
AIMS = {"nvlm-d-tiny": 0.95, "nvlm-x-tiny": 0.9, "nvlm-h-tiny": 0.9}  # of every task with pictures
TEXT_AIM = 0.99
BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="engines and results")
    parser.add_argument("--count", type=int, default=200, help="samples per task")
    options = parser.parse_args()
    for name in NAMES:
        document, agreement = score(name, options.work, options.count)
        write_table(ROOT / "checkpoints" / name / "README.md", table(document, agreement, AIMS[name]))


def score(name: str, work: Path, count: int) -> tuple[dict[str, Any], str]:
    """The engine's results, and how many of its answers are the reference's."""
    checkpoint, engine = ROOT / "checkpoints" / name, work / name
    results = work / f"{name}-engine.json"
    run("build", "--checkpoint", checkpoint, "--output", engine, "--overwrite")
    run("eval", "--engine", engine, "--count", count, "--output", results)
    reference = work / f"{name}-reference.json"
    run("eval", "--reference", checkpoint, "--count", count, "--output", reference)
    document = json.loads(results.read_text())
    expected = {answer["name"]: answer["answer"] for answer in json.loads(reference.read_text())["answers"]}
    equal = sum(expected[answer["name"]] == answer["answer"] for answer in document["answers"])
    return document, f"{equal} of {len(expected)}"


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "nvlm_trt.cli", *map(str, arguments)], check=True)


def table(document: dict[str, Any], agreement: str, aim: float) -> str:
    summary = document["summary"]
    lines = ["| task | exact match | 95 % interval |", "|---|---|---|"]
    for task in summary["tasks"]:
        lines.append(_row(task["task"], task))
    for group, title in (("image", "mean of the tasks with pictures"), ("text", "mean of the text-only tasks")):
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
        aims = f"{aim:.0%} with pictures, {TEXT_AIM:.0%} without".replace("%", " %")
        lines += ["", f"Below what was aimed at ({aims}): {', '.join(missed)}."]
    return "\n".join(lines)


def _row(title: str, score: dict[str, float]) -> str:
    return f"| {title} | {score['score']:.1%} | {score['low']:.1%} to {score['high']:.1%} |".replace("%", " %")


def write_table(card: Path, text: str) -> None:
    before, _, rest = card.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    card.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
