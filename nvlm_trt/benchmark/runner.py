"""Runs a benchmark: one load after the other, until all loads are measured, Ctrl-C, or the end of the server."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvlm_trt.benchmark.load import Load
from nvlm_trt.benchmark.load_processes import LoadProcesses
from nvlm_trt.benchmark.plan import Plan
from nvlm_trt.benchmark.point import ClientUse, Ending, Point
from nvlm_trt.benchmark.prompts import PromptWriter
from nvlm_trt.benchmark.questions import Question, questions
from nvlm_trt.benchmark.record import Record, clock
from nvlm_trt.benchmark.triton_metrics import CounterSnapshot, TritonMetrics
from nvlm_trt.errors import NvlmError, RequestError, ServerError
from nvlm_trt.progress import Progress, no_progress
from nvlm_trt.serving.served_engine import no_server


@dataclass(frozen=True)
class Outcome:
    """Says how a run ended."""

    status: Ending
    failure: NvlmError | None = None  # why the run failed


def run(
    plan: Plan, prompts: PromptWriter, on_point: Callable[[Point], None], progress: Progress = no_progress
) -> Outcome:
    """Measures all loads of `plan`. Call it on the main thread.

    `on_point` gets each load once it is measured, also a load that was cut short. The first Ctrl-C cancels the open
    requests and returns; a second one ends at once, by KeyboardInterrupt.
    """
    return asyncio.run(_Run(plan, prompts, on_point, progress).run())


class _Run:
    """Holds the state of a run."""

    def __init__(
        self, plan: Plan, prompts: PromptWriter, on_point: Callable[[Point], None], progress: Progress
    ) -> None:
        self._plan = plan
        self._prompts = prompts
        self._on_point = on_point
        self._progress = progress
        self._salt = secrets.token_hex(8)
        self._interrupted = False
        self._failure: NvlmError | None = None
        self._driving: asyncio.Future[None] | None = None
        self._point = Point(plan.loads[0])
        self._warmup = 0

    async def run(self) -> Outcome:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        async with LoadProcesses(self._plan.url, self._plan.processes, self._plan.timeout, self._keep) as processes:
            workload = self._plan.workload
            await processes.draw(workload.image_sizes if workload.images else ())
            for number, load in enumerate(self._plan.loads, start=1):
                if self._interrupted or self._failure:
                    break
                try:
                    await self._measure(load, number, processes)
                except NvlmError as error:  # before or after the load's requests: keeps their records
                    self._failure = self._failure or error
                    self._point.status = "failed"
                if self._point.records:
                    self._on_point(self._point)
        if self._failure:
            return Outcome("failed", self._failure)
        return Outcome("interrupted" if self._interrupted else "complete")

    def _interrupt(self) -> None:
        self._interrupted = True
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        if self._driving is not None:
            self._driving.cancel()

    def _keep(self, record: Record) -> None:
        record.warmup = record.index < self._warmup
        self._point.records.append(record)
        total = self._warmup + self._plan.workload.requests
        self._progress(str(self._point.load), len(self._point.records), total)

    async def _measure(self, load: Load, number: int, processes: LoadProcesses) -> None:
        """Measures one load. No pause separates the warm-up from the measured requests.

        After a pause all users would start at once, on an idle server.
        """
        workload, metrics = self._plan.workload, self._plan.server_metrics
        self._point = Point(load)
        self._warmup = load.default_warmup if workload.warmup is None else workload.warmup
        count = self._warmup + workload.requests
        # works in threads, so that the event loop handles Ctrl-C meanwhile
        asked = await asyncio.to_thread(questions, workload, self._prompts, count, f"{self._salt} {number}")
        before = await asyncio.to_thread(metrics.read_settled) if metrics else None
        if self._interrupted:
            return
        cpu_before, parent_before = await processes.cpu_seconds(), time.process_time()
        self._point.started = clock()
        self._driving = asyncio.ensure_future(self._drive(load, asked, processes))
        await asyncio.wait([self._driving])
        wall, parent_cpu = clock() - self._point.started, time.process_time() - parent_before
        if self._driving.cancelled():
            self._point.status = "interrupted"
        elif error := self._driving.exception():
            if not isinstance(error, NvlmError):
                raise error
            self._point.status, self._failure = "failed", error
        self._driving = None
        await processes.cancel_all()
        cpu = [after - before for after, before in zip(await processes.cpu_seconds(), cpu_before, strict=True)]
        self._point.client = ClientUse(wall, cpu, parent_cpu, len(os.sched_getaffinity(0)))
        if before and metrics:
            self._point.server = await self._counted_since(before, metrics)

    async def _drive(self, load: Load, asked: Sequence[Question], processes: LoadProcesses) -> None:
        async def ask(index: int, due: float | None) -> None:
            record = await processes.ask(asked[index], due)
            if record.status == "refused":
                # the server would refuse all other requests, too: there is nothing to measure
                raise RequestError(str(record.error))
            if record.status == "failed" and not await self._server_ready():
                raise ServerError(f"{self._plan.url} does not answer any more ({record.error}); start it again")

        await load.drive(ask, len(asked))

    async def _server_ready(self) -> bool:
        from nvlm_trt.serving.client import AsyncClient

        async with AsyncClient(self._plan.url) as client:
            return await client.ready()

    async def _counted_since(self, before: CounterSnapshot, metrics: TritonMetrics) -> CounterSnapshot | None:
        """Returns the counts since `before`, None if they cannot be read. Raises ServerError if the server is gone."""
        try:
            after = await asyncio.to_thread(metrics.read_settled)
        except ServerError:
            if not self._failure and not await self._server_ready():
                raise no_server(self._plan.url) from None
            return None
        return after.since(before)
