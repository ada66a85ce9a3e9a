"""Starts the load processes and tells each what to ask; `nvlm_trt.benchmark.worker` is the code of such a process.

Processes and asyncio are both needed: every token costs the client some time in Python, so a single process cannot keep
up with a fast server, and a process or thread per request would not scale to hundreds at once. The parent does nothing
per token: it exchanges one line per request with a load process, so its own pauses do not enter the measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nvlm_trt.benchmark.questions import Question
from nvlm_trt.benchmark.record import Record
from nvlm_trt.benchmark.worker import LONGEST_LINE
from nvlm_trt.benchmark.workload import ImageSize
from nvlm_trt.errors import NvlmError

OnRecord = Callable[[Record], None]

_CANCEL_SECONDS = 10
_EXIT_SECONDS = 5


class LoadProcesses:
    """Runs the processes while this async context manager is entered.

    `on_record` gets every record, also the record of a question whose `ask` was cancelled. `timeout`: seconds that a
    request may take.
    """

    def __init__(self, url: str, count: int, timeout: float, on_record: OnRecord) -> None:
        self._url = url
        self._count = count
        self._timeout = timeout
        self._on_record = on_record
        self._processes: list[_LoadProcess] = []

    async def __aenter__(self) -> LoadProcesses:
        try:
            for _ in range(self._count):
                self._processes.append(await _LoadProcess.start(self._url, self._timeout, self._on_record))
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def draw(self, sizes: Sequence[ImageSize]) -> None:
        """Lets every process draw the images that it will need."""
        message = {"draw": [(size.width, size.height) for size in sizes]}
        await asyncio.gather(*(process.request(message) for process in self._processes))

    async def ask(self, question: Question, due: float | None) -> Record:
        """Sends a question, due at `due` (`clock` seconds); returns its record once it is answered.

        Raises NvlmError if the load process ends.
        """
        least_busy = min(self._processes, key=lambda process: len(process.open))
        return await least_busy.ask(question, due)

    async def cpu_seconds(self) -> list[float]:
        """Returns the CPU seconds that each process has used up to now."""
        replies = await asyncio.gather(*(process.request({"cpu": True}) for process in self._processes))
        return [reply["cpu_s"] for reply in replies]

    async def cancel_all(self) -> None:
        """Cancels the open questions and waits for their records."""
        await asyncio.gather(*(process.cancel_all() for process in self._processes))

    async def _end(self) -> None:
        await asyncio.gather(*(process.end() for process in self._processes))


class _LoadProcess:
    """Holds one load process, and the questions and replies that the process still owes."""

    def __init__(self, process: asyncio.subprocess.Process, on_record: OnRecord) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.open: dict[int, asyncio.Future[Record]] = {}
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._on_record = on_record
        self._replies: list[asyncio.Future[dict[str, Any]]] = []  # awaited, oldest first
        self._reader = asyncio.ensure_future(self._read())

    @classmethod
    async def start(cls, url: str, timeout: float, on_record: OnRecord) -> _LoadProcess:
        # a session of its own: the terminal's Ctrl-C must reach the parent only, which then cancels in order
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "nvlm_trt.benchmark.worker",
            url,
            str(timeout),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=LONGEST_LINE,
        )
        return cls(process, on_record)

    async def ask(self, question: Question, due: float | None) -> Record:
        answered = self.open[question.index] = asyncio.get_running_loop().create_future()
        self._send({"ask": question.to_json(), "due": due})
        # shielded: a question stays open until its record is there
        return await asyncio.shield(answered)

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        reply = asyncio.get_running_loop().create_future()
        self._replies.append(reply)
        self._send(message)
        return await reply

    async def cancel_all(self) -> None:
        if self.open:
            self._send({"cancel": True})
            await asyncio.wait(list(self.open.values()), timeout=_CANCEL_SECONDS)

    async def end(self) -> None:
        self._stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_SECONDS)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await self._reader

    def _send(self, message: dict[str, Any]) -> None:
        if self._reader.done():
            self._fail()
        else:
            self._stdin.write(json.dumps(message, allow_nan=False).encode() + b"\n")

    async def _read(self) -> None:
        async for line in self._stdout:
            message = json.loads(line)
            if "record" not in message:
                self._replies.pop(0).set_result(message)
                continue
            record = Record.from_json(message["record"])
            self._on_record(record)
            self.open.pop(record.index).set_result(record)
        await self._process.wait()
        self._fail()

    def _fail(self) -> None:
        """Fails everything that waits for this process: it has ended although the parent did not end it."""
        status = self._process.returncode
        error = NvlmError(f"a load process ended with status {status}; see what it says above, and run again")
        waiting_for: list[asyncio.Future[Any]] = [*self.open.values(), *self._replies]
        for waiting in waiting_for:
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # marks it as retrieved: nobody may wait for it any more
        self.open.clear()
        self._replies.clear()
