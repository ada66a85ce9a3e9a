"""Checks on a GPU: kernels against the reference and against torch, TensorRT where it is installed, with times.

Each section runs in processes of its own: a kernel that breaks the GPU's context breaks only the rest of that process.
The exit status is 1 if a result is wrong, 2 if nothing could run. Missed speeds and missing tools are no failures; the
report names them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab.code_state import ROOT, code_state
from lab.gpu_check import report
from lab.gpu_check.record import NOT_RUN, WRONG, Check, Record, Trial, perform

SECTIONS = ("ceilings", "attention", "attention-speed", "tile_resample", "tensorrt", "rtx")
INTERPRETED = ("attention", "tile_resample")
PARTS = {"attention": 8}  # processes side by side: nothing is timed there, and the kernels take minutes to compile
DOCS = ROOT / "docs"
RESERVE = 20.0  # seconds before the end in which no trial starts


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.render:
        try:
            report.write(options.output or options.render.parent, options.render.stem, report.load(options.render))
        except ValueError as error:
            return _fail(str(error))
        return 0
    if options.section:
        return run_here(options)
    problem = _problem(options)
    if problem:
        return _fail(problem)
    command = ["lab/gpu_check.sh", *(sys.argv[1:] if arguments is None else arguments)]
    return _run_all(options, shlex.join(command))


def _problem(options: argparse.Namespace) -> str | None:
    """Says in one line why nothing can run; None if something can."""
    if options.tune + options.interpret + bool(options.only) > 1:
        return "--tune, --interpret and --only exclude each other"
    if options.interpret and not options.output:
        return "--interpret needs --output DIRECTORY: docs/ is for results of a GPU"
    if options.rtx_engines and not any(options.rtx_engines.glob("*.npz")):
        return f"--rtx-engines {options.rtx_engines} has no engines; `python -m lab.gpu_check.rtx_engines` writes them"
    missing = [name for name in ("torch", "triton", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} lacks {', '.join(missing)}; set PYTHON to a Python that has them"
    import torch

    if not options.interpret and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no GPU, so there is nothing to check; run this on a machine with one, or "
            "try --interpret --output DIRECTORY for a few small shapes on the CPU"
        )
    return None


def _sections(options: argparse.Namespace) -> tuple[str, ...]:
    """Lists the sections to run. The ceilings come first: other sections report shares of them."""
    if options.tune:
        return ("tune",)
    if options.interpret:
        return INTERPRETED
    return tuple(dict.fromkeys(("ceilings", *options.only))) if options.only else SECTIONS


def _run_all(options: argparse.Namespace, command: str) -> int:
    from lab.gpu_check.measure import machine

    directory, stem = options.output or DOCS, "gpu_tune" if options.tune else "gpu_report"
    started = time.time()
    found: dict[str, Any] = {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime(started)),
        "machine": machine(options.interpret),
        "code": code_state(),
    }
    with tempfile.TemporaryDirectory() as folder:
        record = Record(Path(folder) / "checks.jsonl")
        for section in _sections(options):
            more = ["--rtx-minutes", str(options.rtx_minutes)]
            more += ["--rtx-engines", str(options.rtx_engines.resolve())] if options.rtx_engines else []
            run_apart(section, record, started + 60 * options.minutes, options.interpret, more)
            found |= {"seconds": time.time() - started, "checks": [asdict(check) for check in record.read()]}
            report.write(directory, stem, found)  # each time: a run may be cut short
        if options.tune:
            from lab.gpu_check.tune import best

            print(*best(record), sep="\n")
        checks = record.read()
    print(f"{report.summary(checks)}; wrote {directory / stem}.md and .json")
    return 1 if any(check.status == WRONG for check in checks) else 0


def run_apart(section: str, record: Record, end: float, interpret: bool, more: Sequence[str] = ()) -> None:
    """Runs a section in processes of its own, and stops them and their children when the time is up. `more`: arguments
    of these processes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    count = 1 if interpret else PARTS.get(section, 1)
    parts = [record]
    if count > 1:
        parts = [Record(record.path.with_suffix(f".{section}-{part}")) for part in range(count)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for part in range(count):
            command = [sys.executable, "-m", "lab.gpu_check", "--section", section]
            command += ["--record", str(parts[part].path.resolve()), "--deadline", str(end - RESERVE)]
            command += ["--part", str(part), str(count), *["--interpret"] * interpret, *more]
            # -m imports from the current directory first
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True))
        for process, part_record in zip(processes, parts, strict=True):
            _wait(process, section, part_record, end - RESERVE / 2)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if count > 1:
        for check in itertools.chain.from_iterable(part_record.read() for part_record in parts):
            record.add(check)


def _wait(process: subprocess.Popen[bytes], section: str, record: Record, end: float) -> None:
    try:
        status = process.wait(timeout=max(0.0, end - time.time()))
    except subprocess.TimeoutExpired:
        record.add(Check(section, "the rest", NOT_RUN, note="the time was up"))
        return
    if status:
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        record.add(Check(section, "the rest", WRONG, note=f"the process ended with {name}; see its messages"))


def run_here(options: argparse.Namespace) -> int:
    record = Record(options.record)
    trials: Iterable[Trial] = trials_of(options, record)
    part, count = options.part
    if count > 1:  # neighbours stay together: they often share a compiled kernel
        listed = list(trials)
        trials = listed[part * len(listed) // count : (part + 1) * len(listed) // count]
    perform(options.section, trials, record, options.deadline)
    return 0


def trials_of(options: argparse.Namespace, record: Record) -> Iterator[Trial]:
    """Yields a section's trials. Imports the section here: an import settles the interpreter's mode and TensorRT."""
    import torch

    device = "cpu" if options.interpret else "cuda"
    if options.section == "ceilings":
        from lab.gpu_check import measure

        return measure.ceilings()
    if options.section == "attention":
        from lab.gpu_check import attention

        # the interpreter multiplies bf16 wrongly
        dtypes = [torch.float32, torch.float16, *[torch.bfloat16] * (not options.interpret)]
        return attention.trials(device, dtypes)
    if options.section == "attention-speed":
        from lab.gpu_check import attention_speed

        return attention_speed.trials(record)
    if options.section == "tile_resample":
        from lab.gpu_check import resample

        return resample.trials(device, record)
    if options.section == "tune":
        from lab.gpu_check import tune

        return tune.trials(options.deadline)
    if options.section == "tensorrt":
        from lab.gpu_check import tensorrt_engines

        return tensorrt_engines.trials()
    from lab.gpu_check import rtx

    return rtx.trials(options.rtx_engines, options.rtx_minutes)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="for gpu_report.md and .json; docs/ if absent")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}"
    )
    parser.add_argument("--tune", action="store_true", help="time alternative block sizes instead: gpu_tune.md, .json")
    parser.add_argument("--interpret", action="store_true", help="without a GPU: small shapes in Triton's interpreter")
    parser.add_argument("--render", type=Path, metavar="JSON", help="write the page of a report's JSON again")
    parser.add_argument(
        "--rtx-engines", type=Path, metavar="DIRECTORY", help="engines of rtx_engines.py; built here if absent"
    )
    parser.add_argument(
        "--rtx-minutes", type=float, default=3, help="time limit of the checks of TensorRT-RTX (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=9, help="time limit of the run (%(default)s)")
    for hidden, kind in (
        ("--section", str),
        ("--record", Path),
        ("--deadline", float),
    ):  # for the processes that this one starts
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    return parser


def _fail(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the report has the finished sections", file=sys.stderr)
        sys.exit(130)
