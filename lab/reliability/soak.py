"""Keeps a server under full load for a long time: every answer, the memory and the latency have to stay the same.

    python -m lab.reliability.soak --work WORK --minutes 60 --concurrency 8

Texts, cached, new and several images, long prompts, cancellations and wrong requests go to one server over gRPC and
HTTP. Each greedy answer is compared, token by token, with the first to its question. A run that is interrupted goes on
with the minutes that are left and a new server: its stretches are told apart. Exit status 1: a goal was missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from lab.reliability.course import Verdict, never_differs, parser, run, say, served_engine
from lab.reliability.question import HTTP, SoakQuestion, questions
from lab.reliability.request_cases import message, strings
from lab.reliability.soak_course import Ask, SoakCourse, Stretch
from lab.reliability.target import ServedTarget
from lab.reliability.values import dumped
from lab.reliability.wire import Reply, Wire
from lab.run_file import RunFile

RESULT = "reliability_soak.json"
MOST_GROWTH_PERCENT = 2.0
MOST_DRIFT_PERCENT = 10.0
_REQUEST_SECONDS = 120.0
_SHORTEST = 60.0  # seconds of a stretch that is kept after an interruption


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--minutes", type=float, default=60)
    made.add_argument("--concurrency", type=int, default=8)
    return made


def measure(arguments: argparse.Namespace, file: RunFile) -> Verdict:
    """Adds a stretch of the minutes that are left."""
    stretches: list[dict[str, Any]] = []
    if file.resume(never_differs, _content):
        stretches = [stretch for stretch in file.record["stretches"] if stretch["seconds"] >= _SHORTEST]
    left = 60 * arguments.minutes - sum(stretch["seconds"] for stretch in stretches)
    if left > 1:
        with ServedTarget(served_engine(arguments), arguments.work / "soaked") as target:
            wire = target.wire()
            asked = questions(arguments.seed)
            course = SoakCourse(asking(wire), asked, target.roles, target.kept, arguments.concurrency)

            def keep(stretch: Stretch) -> None:
                say(_line(stretch))
                file.keep({"stretches": [*stretches, stretch.to_json()]})

            stretch = course.run(left, target.is_alive, keep)
            keep(stretch)
            stretches.append(stretch.to_json())
            wire.close()
    print(*table(stretches), sep="\n")
    return _verdict(arguments, [Stretch(**stretch) for stretch in stretches])


def asking(wire: Wire) -> Ask:
    """Returns the function that sends a question over its transport."""

    def ask(question: SoakQuestion) -> Reply:
        if question.transport == HTTP:
            return wire.send_http("/v2/models/nvlm/generate_stream", question.body, 10_000, _REQUEST_SECONDS)
        tensors = {
            "prompt": strings(question.prompt.encode()),
            "sampling_parameters": strings(dumped(question.sampling)),
        }
        if question.images:
            tensors["image"] = strings(*question.images)
        if question.leaves_after:
            return wire.leave_grpc(message(tensors), question.leaves_after)
        return wire.send_grpc(message(tensors), 10_000, _REQUEST_SECONDS)

    return ask


def faults(stretch: Stretch) -> list[str]:
    """Names the goals that a stretch missed."""
    found = []
    if stretch.errors or stretch.differing:
        found.append(f"{stretch.errors} errors and {stretch.differing} other answers: {'; '.join(stretch.lines[:3])}")
    found += [
        f"{role} grew by {percent:.1f} % ({stretch.growth_mb[role]:.1f} MiB), more than {MOST_GROWTH_PERCENT:.0f} %"
        for role, percent in stretch.growth_percent.items()
        if percent > MOST_GROWTH_PERCENT
    ]
    if stretch.drift_percent > MOST_DRIFT_PERCENT:
        found.append(
            f"p95 went from {stretch.first_p95_ms:.0f} to {stretch.last_p95_ms:.0f} ms, {stretch.drift_percent:+.0f} %"
        )
    return found


def table(stretches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Writes the tables of the page."""
    lines = ["| minutes | requests | errors | other answers | memory | p95 first, last |", "|---|---|---|---|---|---|"]
    for each in (Stretch(**stretch) for stretch in stretches):
        grown = ", ".join(f"{role} {percent:+.1f} %" for role, percent in each.growth_percent.items()) or "not told"
        lines.append(
            f"| {each.seconds / 60:.0f} | {sum(each.requests.values()):,} | {each.errors} | {each.differing} | {grown} "
            f"| {each.first_p95_ms:.0f}, {each.last_p95_ms:.0f} ms ({each.drift_percent:+.0f} %; windows of "
            f"{each.window_s / 60:.0f} min) |"
        )
    return lines


def _verdict(arguments: argparse.Namespace, stretches: Sequence[Stretch]) -> Verdict:
    minutes = sum(stretch.seconds for stretch in stretches) / 60
    missing = (
        [] if minutes >= arguments.minutes - 0.1 else [f"{minutes:.0f} of {arguments.minutes:.0f} minutes are done"]
    )
    return Verdict(missing, [fault for stretch in stretches for fault in faults(stretch)])


def _line(stretch: Stretch) -> str:
    return (
        f"{stretch.seconds:.0f} s: {sum(stretch.requests.values())} requests, {stretch.errors} errors, "
        f"{stretch.differing} other answers, p95 {stretch.first_p95_ms:.0f} -> {stretch.last_p95_ms:.0f} ms, "
        f"memory {stretch.growth_percent}"
    )


def _content(record: Mapping[str, Any]) -> str:
    return f"{sum(stretch['seconds'] for stretch in record['stretches']) / 60:.0f} minutes are done"


if __name__ == "__main__":
    run(options(), measure, RESULT)
