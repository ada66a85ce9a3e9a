"""Sends the numbered requests of a seed to a real server, and judges what comes back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from lab.reliability.finding import REQUESTS, Finding
from lab.reliability.memory import Growth, MemoryWatch
from lab.reliability.request_case import ANSWER, GRPC, REFUSAL, RequestCase
from lab.reliability.request_cases import message, request_case, strings
from lab.reliability.wire import Reply, Wire
from nvlm_trt.errors import QueueFullError, RequestError

BUDGET_SECONDS = 90.0
FLAT_MEBIBYTES = 48.0
FLAT_PERCENT = 10.0
_INTERNAL = re.compile(r"internal error|Traceback|\bAt:\n|\.py\(\d+\)|what\(\)|Segmentation|std::")
_LONGEST_MESSAGE = 2000
_CLIENTS = 4
_END_SECONDS = 3.0
_REFERENCE = message(
    {"prompt": strings(b"What is the total?"), "sampling_parameters": strings(b'{"max_tokens": 8, "ignore_eos": true}')}
)


class Target(Protocol):
    """A server under test."""

    def wire(self) -> Wire: ...

    def is_alive(self) -> bool: ...

    def roles(self) -> dict[str, int]: ...

    def kept(self) -> dict[str, float]: ...


@dataclass
class RequestCounts:
    """Holds what is known of the requests up to `done`. The record of a run keeps it."""

    done: int = 0
    answered: int = 0
    refused: int = 0
    queue_full: int = 0
    tritons_refusals: int = 0  # in tritonserver's own words
    faults: int = 0
    seconds: float = 0.0
    growth_mb: dict[str, float] = field(default_factory=dict)
    growth_percent: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @property
    def leaks(self) -> list[str]:
        return [
            role
            for role, grown in self.growth_mb.items()
            if grown > FLAT_MEBIBYTES and self.growth_percent[role] > FLAT_PERCENT
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RequestFuzz:
    """Sends blocks of requests from several threads; after each block the server has to give its first answer."""

    def __init__(
        self, seed: int, counts: RequestCounts, target: Target, make: Callable[..., Any] = request_case
    ) -> None:
        """`make`: (seed, number) -> RequestCase."""
        self.counts = counts
        self._seed, self._target, self._make = seed, target, make
        self._memory = MemoryWatch(target.roles)
        self._first: tuple[int, ...] | None = None

    def run(self, until: int, block: int, deadline: float) -> Iterator[list[Finding]]:
        """Sends the requests up to number `until`. Yields each block's findings; ends with the server."""
        wire = self._target.wire()
        with ThreadPoolExecutor(_CLIENTS) as clients:
            while self.counts.done < until and time.monotonic() < deadline:
                numbers = range(self.counts.done, min(until, self.counts.done + block))
                started = time.monotonic()
                cases = [self._make(self._seed, number) for number in numbers]
                replies = list(clients.map(lambda case: send(wire, case), cases))
                findings = [
                    self._finding(number, case, fault)
                    for number, case, reply in zip(numbers, cases, replies, strict=True)
                    if (fault := self._count(case, reply))
                ]
                if findings and self._died():
                    findings = findings[:_CLIENTS]  # those in flight; another server gets the others again
                    self.counts.done = findings[-1].number + 1
                else:
                    findings += self._reference(wire, numbers)
                    self.counts.done = numbers.stop
                self.counts.faults += len(findings)
                self.counts.findings += [finding.line for finding in findings]
                self.counts.seconds = round(self.counts.seconds + time.monotonic() - started, 1)
                self._memory.sample(self._target.kept())
                self._note_growth()
                yield findings
                if not self._target.is_alive():
                    break
        wire.close()

    def _died(self) -> bool:
        """Says whether the server has ended; it takes a moment to notice that."""
        deadline = time.monotonic() + _END_SECONDS
        while self._target.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self._target.is_alive()

    def _count(self, case: RequestCase, reply: Reply) -> str:
        """Counts a reply. Returns the fault, or nothing."""
        fault = judge(case, reply)
        if not fault:
            self.counts.answered += reply.answered
            self.counts.refused += isinstance(reply.error, RequestError)
            self.counts.queue_full += isinstance(reply.error, QueueFullError)
            own = isinstance(reply.error, (RequestError, QueueFullError))
            self.counts.tritons_refusals += reply.error is not None and not own
        return fault

    def _reference(self, wire: Wire, numbers: range) -> list[Finding]:
        """Asks the same question after each block."""
        case = RequestCase("the same question as at the start", _REFERENCE, expected=ANSWER)
        reply = send(wire, case)
        fault = judge(case, reply)
        if not fault and self._first is not None and reply.tokens != self._first:
            fault = f"another answer than at the start: {reply.tokens} instead of {self._first}"
        if not fault:
            self._first = reply.tokens
            return []
        fault = f"after requests {numbers.start} to {numbers.stop - 1}: {fault}"
        return [self._finding(numbers.stop - 1, case, fault)]

    def _finding(self, number: int, case: RequestCase, fault: str) -> Finding:
        return Finding.of(REQUESTS, self._seed, number, f"{case.made}, {case.transport}", fault, case.sent)

    def _note_growth(self) -> None:
        grown: dict[str, Growth] = self._memory.growths()
        self.counts.growth_mb = {role: round(found.mebibytes, 1) for role, found in sorted(grown.items())}
        self.counts.growth_percent = {role: round(found.percent, 1) for role, found in sorted(grown.items())}


def send(wire: Wire, case: RequestCase) -> Reply:
    if case.message is not None:
        return wire.send_grpc(case.message, case.take, BUDGET_SECONDS)
    return wire.send_http(case.path, case.body, case.take, BUDGET_SECONDS)


def judge(case: RequestCase, reply: Reply) -> str:
    """Returns what is wrong with a reply, or nothing."""
    if reply.broken:
        return reply.broken
    if reply.error is None:
        return "a request that is wrong was answered" if case.expected == REFUSAL else ""
    told = str(reply.error)
    if _INTERNAL.search(told):
        return f"an internal error: {told}"
    if isinstance(reply.error, QueueFullError):
        return ""
    if case.expected == ANSWER:
        return f"a valid request was refused: {told}"
    if case.ours and not isinstance(reply.error, RequestError):
        return f"{type(reply.error).__name__} instead of a RequestError: {told}"
    if case.transport != GRPC and reply.status is not None and reply.status >= 500 and case.ours:
        return f"status {reply.status}: {told}"
    if "\n" in told or len(told) > _LONGEST_MESSAGE:
        return f"the message is not one short line: {told[:300]!r}"
    return ""
