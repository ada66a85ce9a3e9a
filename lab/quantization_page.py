"""Makes the tables of docs/quantization.md from the rows that lab.quantization_table measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.marked_page import replace_between
from nvlm_trt.evaluation.tinydocs import TASKS, TEXT_TASKS

BEGIN, END = "<!-- quantization table: begin -->", "<!-- quantization table: end -->"


def tables(rows: Sequence[dict[str, Any]], origin: str, samples_per_task: int) -> str:
    """Writes two tables per checkpoint: sizes, agreement and speed; accuracy by task. `origin` says when and where."""
    lines = [f"{origin}; {samples_per_task} samples of each task of TinyDocs' test split.", ""]
    for checkpoint in dict.fromkeys(row["checkpoint"] for row in rows):
        of_checkpoint = [row for row in rows if row["checkpoint"] == checkpoint]
        lines += [f"**{checkpoint}**", "", *overview(of_checkpoint), "", *by_task(of_checkpoint), ""]
    return "\n".join(lines)


def replace_tables(page: Path, text: str) -> None:
    """Replaces the text between the markers of `page`."""
    replace_between(page, BEGIN, END, text)


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
