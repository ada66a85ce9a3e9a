"""Tries grammars in a process that can be ended: some take hours or gigabytes to compile, or end the process.

llguidance bounds most of its work, but `a{100000000}` takes 10 GB, and a thousand schemas that refer to each other
overflow the stack. `nvlm_trt.runtime.grammar_trial` starts the process, which reads a JSON line for each constraint and
answers with a JSON line: what is wrong, or nothing. It ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
from typing import Any

from nvlm_trt.runtime.finite_schema import has_finite_answer
from nvlm_trt.runtime.grammar_source import grammar_text, one_line, start_matcher
from nvlm_trt.runtime.repetition import MOST_REPEATED, patterns_of, repeated

CPU_SECONDS = 0.5  # for one constraint: 50 times what a schema of 300 properties takes
MEMORY_BYTES = 32 << 20  # beyond what the process has at its start
# A thread of the process that serves has at least 2 MiB: what compiles here compiles there.
_STACK_BYTES = 1 << 20
_NICENESS = 10  # running answers come first
_STEPS = 64  # of an answer in bytes, which is made up


def main() -> None:
    """Try constraints until the owner closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is the owner's business
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _serve() -> None:
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    _try(tokenizer, "json_schema", {"properties": {"a": {"type": "string"}}})  # what is imported or made once
    limit = _mapped_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # an abort prints; the owner tells errors in one line
    for line in sys.stdin.buffer:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        fault = _try(tokenizer, job["kind"], job["value"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps({"fault": fault}, allow_nan=False).encode() + b"\n")
        sys.stdout.buffer.flush()


def _try(tokenizer: Any, kind: Any, value: Any) -> str | None:
    """Return what is wrong with a constraint. The kernel may end the process instead."""
    most = max(map(repeated, patterns_of(kind, value)), default=0)
    if most > MOST_REPEATED:
        return (
            f"a regular expression repeats {most} parts by counts such as {{1,9}}; at most {MOST_REPEATED} are allowed"
        )
    if kind == "json_schema" and not has_finite_answer(value):
        return "it refers to itself without an end, so that no finite JSON fits it"
    try:
        matcher = start_matcher(tokenizer, grammar_text(kind, value))
    except ValueError as error:
        return one_line(str(error))
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        return "no text fits it"
    choose = random.Random(0)
    for _ in range(_STEPS):
        allowed = [i for i in range(tokenizer.vocab_size) if mask[i >> 3] >> (i & 7) & 1]
        if matcher.consume_token(choose.choice(allowed)) and not matcher.is_stopped():
            mask = matcher.compute_bitmask()
        if matcher.is_error():
            return f"it is too complex ({one_line(matcher.get_error())})"
        if matcher.is_stopped():
            return None
    return None


def _mapped_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
