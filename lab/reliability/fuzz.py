"""Sends damaged files and odd requests to the product, and keeps every input that it did not treat as promised.

    python -m lab.reliability.fuzz --work WORK
    python -m lab.reliability.fuzz --work WORK --replay WORK/findings/files-1-77.json

Files are decoded and tiled by the product's own functions in processes that a watchdog ends; requests go to a real
server over gRPC and HTTP. A crash, no answer in time, an error of the wrong kind and memory that grows are faults. The
run writes its results after every block, and the same command goes on with them. Exit status 1: faults were seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.reliability.course import Verdict, never_differs, parser, run, say, served_engine, shortened
from lab.reliability.decode_worker import DECODER, DecodeWorker
from lab.reliability.file_fuzz import BUDGET_SECONDS, FileCounts, FileFuzz
from lab.reliability.finding import FILES, REQUESTS, Finding
from lab.reliability.request_cases import request_case
from lab.reliability.request_fuzz import RequestCounts, RequestFuzz, judge, send
from lab.reliability.target import ServedTarget
from lab.run_file import Record, RunFile
from nvlm_trt.machine import available_cores

RESULT = "reliability_fuzz.json"
_FILE_BLOCK, _REQUEST_BLOCK = 500, 100
_WAY_BACK = 4  # requests before the finding that a replay sends first: those were in flight with it


def options() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--files", type=int, default=50_000)
    made.add_argument("--requests", type=int, default=20_000)
    made.add_argument("--seconds", type=float, default=3600, help="most seconds of this call; a later one goes on")
    made.add_argument("--file-seconds", type=float, default=BUDGET_SECONDS, help="budget of one file")
    made.add_argument("--decoder", default=DECODER, metavar="MODULE:FUNCTION", help="what decodes the files")
    made.add_argument("--replay", type=Path, metavar="FILE", help="bring one finding about again, and stop")
    return made


def measure(arguments: argparse.Namespace, file: RunFile) -> Verdict:
    """Goes on with the files, then with the requests."""
    if arguments.replay:
        return replay(arguments, Finding.read(arguments.replay))
    files, requests = FileCounts(), RequestCounts()
    if file.resume(never_differs, _content):
        files, requests = _counts(file.record)
    deadline = time.monotonic() + arguments.seconds
    folder = arguments.work / "findings"
    fuzz_files(arguments, files, deadline, folder, lambda: _keep(file, files, requests))
    fuzz_requests(arguments, requests, deadline, folder, lambda: _keep(file, files, requests))
    _keep(file, files, requests)
    print(*table(file.record), sep="\n")
    return _verdict(arguments, files, requests)


def fuzz_files(arguments: argparse.Namespace, counts: FileCounts, deadline: float, folder: Path, keep: Any) -> None:
    """Decodes the files that are left."""
    fuzz = FileFuzz(arguments.seed, arguments.decoder, counts, available_cores(), arguments.file_seconds)
    for findings in fuzz.run(arguments.files, _FILE_BLOCK, deadline):
        _tell(findings, folder)
        say(f"{counts.done} of {arguments.files} files, {counts.faults} faults")
        keep()


def fuzz_requests(
    arguments: argparse.Namespace, counts: RequestCounts, deadline: float, folder: Path, keep: Any
) -> None:
    """Sends the requests that are left. A server that has ended is a fault, and another takes its place."""
    while counts.done < arguments.requests and time.monotonic() < deadline:
        with ServedTarget(served_engine(arguments), arguments.work / "fuzzed") as target:
            fuzz = RequestFuzz(arguments.seed, counts, target)
            for findings in fuzz.run(arguments.requests, _REQUEST_BLOCK, deadline):
                _tell(findings, folder)
                say(f"{counts.done} of {arguments.requests} requests, {counts.faults} faults")
                keep()
            if not target.is_alive():
                counts.faults += 1
                last = (target.served.errors.strip().splitlines() or ["it printed nothing"])[-1]
                counts.findings.append(f"the server ended among the requests before {counts.done}: {last}")
                say(counts.findings[-1])
                keep()


def replay(arguments: argparse.Namespace, finding: Finding) -> Verdict:
    """Brings a finding about again. The verdict has it as a fault if it is still one."""
    say(finding.line)
    fault = ""
    if finding.part == FILES:
        worker = DecodeWorker(finding.seed, arguments.decoder, arguments.file_seconds)
        outcome = worker.run(finding.number)
        worker.close()
        say(f"now: {outcome.verdict} {outcome.detail}".rstrip())
        fault = outcome.detail
    elif finding.part == REQUESTS:
        with ServedTarget(served_engine(arguments), arguments.work / "fuzzed") as target:
            wire = target.wire()
            for number in range(max(0, finding.number - _WAY_BACK), finding.number + 1):
                case = request_case(finding.seed, number)
                reply = send(wire, case)
                fault = judge(case, reply)
                say(f"request {number} ({case.made}): {fault or reply}")
            wire.close()
            fault = fault or ("" if target.is_alive() else "the server ended")
    return Verdict(missing=["a replay is not published"], faults=[fault] if fault else [])


def table(record: Mapping[str, Any]) -> list[str]:
    """Writes the rows of the page."""
    files, requests = FileCounts(**record["files"]), RequestCounts(**record["requests"])
    grown = ", ".join(f"{role} {mebibytes:+.0f} MiB" for role, mebibytes in requests.growth_mb.items()) or "not told"
    return [
        "| fuzz | inputs | treated as promised | faults | memory after warm-up |",
        "|---|---|---|---|---|",
        f"| files, seed {record['settings']['seed']} | {files.done:,} | {files.decoded:,} decoded, {files.refused:,} "
        f"refused; slowest {files.slowest_s:.1f} s ({files.slowest}) | {files.faults} | {files.growth_mb:+.0f} MiB; "
        f"peak {files.peak_mb:,.0f} MiB |",
        f"| requests, seed {record['settings']['seed']} | {requests.done:,} | {requests.answered:,} answered, "
        f"{requests.refused:,} refused, {requests.tritons_refusals:,} refused by tritonserver, "
        f"{requests.queue_full:,} with a full queue | {requests.faults} | {grown} |",
    ]


def _verdict(arguments: argparse.Namespace, files: FileCounts, requests: RequestCounts) -> Verdict:
    verdict = Verdict(faults=shortened([*files.findings, *requests.findings]))
    if files.leaks:
        verdict.faults.append(f"a process that decodes grew by {files.growth_mb:.0f} MiB")
    verdict.faults += [f"{role} grew by {requests.growth_mb[role]:.0f} MiB" for role in requests.leaks]
    for done, wanted, what in ((files.done, arguments.files, "files"), (requests.done, arguments.requests, "requests")):
        if done < wanted:
            verdict.missing.append(f"{done} of {wanted} {what} are done")
    return verdict


def _keep(file: RunFile, files: FileCounts, requests: RequestCounts) -> None:
    file.keep({"files": files.to_json(), "requests": requests.to_json()})


def _counts(record: Record) -> tuple[FileCounts, RequestCounts]:
    return FileCounts(**record["files"]), RequestCounts(**record["requests"])


def _content(record: Record) -> str:
    files, requests = _counts(record)
    return f"{files.done} files and {requests.done} requests are done"


def _tell(findings: list[Finding], folder: Path) -> None:
    for finding in findings:
        say(f"{finding.line} -> {finding.write(folder)}")


if __name__ == "__main__":
    run(options(), measure, RESULT)
